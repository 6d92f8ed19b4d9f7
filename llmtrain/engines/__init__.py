"""Backends. A new one is a file here with a class that has `contracts.Engine`'s methods, a section
in `recipe/schema.py`, and a line in `prepare`."""

from llmtrain.contracts import Engine
from llmtrain.distributed import World
from llmtrain.engines.replicated import ReplicatedEngine
from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import Recipe

GPU_ATTENTION = ("flex_attention", "flash_attention_2")


def check(recipe: Recipe, world: World) -> None:
    """Raises InputError where the backend that the recipe asks for cannot run in this world.

    Apart from `prepare`, so that it is said before hours of reading data.
    """
    if recipe.engine.kind == "single" and world.size > 1:
        raise InputError(
            f"engine single is for one process, and there are {world.size}",
            where="engine.kind",
            remedy="use ddp or auto, or start one process",
        )
    if recipe.engine.kind == "ddp" and world.size == 1:
        raise InputError(
            "engine ddp is for several processes, and there is one",
            where="engine.kind",
            remedy="start with torchrun --nproc-per-node N -m llmtrain train ..., or use single or auto",
        )

    if recipe.model.attention in GPU_ATTENTION and world.device.type == "cpu":
        raise InputError(
            f"{recipe.model.attention} has no backward on a CPU",
            where="model.attention",
            remedy="use auto, sdpa or eager here",
        )


def prepare(decoder: Decoder, recipe: Recipe, world: World) -> Engine:
    """Puts the model on the backend that the recipe asks for.

    Raises:
        InputError: the backend cannot run in this world, or not this model.
    """
    check(recipe, world)
    return ReplicatedEngine(decoder, recipe, world)
