"""Backends. A new one is a file here with a class that has `contracts.Engine`'s methods, a section
in `recipe/schema/engine.py`, and a line in each of the two functions here."""

from llmtrain.contracts import Engine, FrozenModel
from llmtrain.distributed import World
from llmtrain.models.blueprint import Blueprint
from llmtrain.recipe.schema import DeepSpeedEngine, FSDPEngine, Recipe


def prepare(blueprint: Blueprint, recipe: Recipe, world: World) -> Engine:
    """Puts a model to train on the backend that the recipe asks for.

    Raises:
        InputError: the backend cannot run this model.
        TrainingError: what runs is not what was asked for.
    """
    if isinstance(recipe.engine, FSDPEngine):
        from llmtrain.engines import fsdp

        return fsdp.FSDPEngine(blueprint, recipe, world)
    if isinstance(recipe.engine, DeepSpeedEngine):
        from llmtrain.engines import deepspeed

        return deepspeed.DeepSpeedEngine(blueprint, recipe, world)
    from llmtrain.engines.replicated import ReplicatedEngine

    return ReplicatedEngine(blueprint, recipe, world)


def prepare_frozen(blueprint: Blueprint, recipe: Recipe, world: World) -> FrozenModel:
    """Puts a model that is only asked (reference, reward, teacher) on the recipe's backend."""
    if isinstance(recipe.engine, FSDPEngine):
        from llmtrain.engines import fsdp

        return fsdp.FSDPFrozen(blueprint, recipe, world)
    if isinstance(recipe.engine, DeepSpeedEngine):
        from llmtrain.engines import deepspeed

        return deepspeed.DeepSpeedFrozen(blueprint, recipe, world)
    from llmtrain.engines.replicated import ReplicatedFrozen

    return ReplicatedFrozen(blueprint, recipe, world)
