"""Whether a recipe's backend can run on the ranks and the device that there are."""

from llmtrain.recipe.deepspeed_json import check_deepspeed_json
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import DeepSpeedEngine, FSDPEngine, Recipe

_GPU_ATTENTION = ("flex_attention", "flash_attention_2")


def check_layout(recipe: Recipe, world_size: int, device: str | None = None) -> None:
    """Raises RecipeError, with all that is wrong, where the backend cannot run so.

    Args:
        world_size: ranks.
        device: "cpu" or "cuda", what the ranks compute on; None where it is not known yet.
    """
    if isinstance(recipe.engine, DeepSpeedEngine):
        check_deepspeed_json(recipe, world_size)
    problems = [*_of_ranks(recipe, world_size), *(_of_cpu(recipe) if device == "cpu" else [])]
    if problems:
        raise RecipeError(recipe.name, problems)


def smallest_world(recipe: Recipe) -> int:
    """The least number of ranks that the recipe's engine runs on, to check a recipe by before ranks are known."""
    engine = recipe.engine
    if isinstance(engine, FSDPEngine):
        kept = engine.reshard_after_forward
        return max(2, engine.shard_size or (1 if isinstance(kept, bool) else kept))
    if isinstance(engine, DeepSpeedEngine) and engine.zero_plus_plus is not None:
        return engine.zero_plus_plus.hpz_partition_size
    return 2 if engine.kind == "ddp" else 1


def _of_ranks(recipe: Recipe, world_size: int) -> list[Problem]:
    engine = recipe.engine
    if engine.kind == "single" and world_size > 1:
        return [
            Problem(
                "engine.kind",
                f"engine single is for one process, and there are {world_size}: use ddp, fsdp or auto, "
                "or start one process",
            )
        ]
    if engine.kind in ("ddp", "fsdp") and world_size == 1:
        return [
            Problem(
                "engine.kind",
                f"engine {engine.kind} is for several processes, and there is one: start with "
                "torchrun --nproc-per-node N -m llmtrain train ..., or use single or auto",
            )
        ]
    problems = []
    if isinstance(engine, FSDPEngine):
        shard = engine.shard_size or world_size
        divisors = ", ".join(str(number) for number in range(1, world_size + 1) if world_size % number == 0)
        if world_size % shard:
            message = f"{shard} does not divide the {world_size} ranks: use one of {divisors}"
            problems.append(Problem("engine.shard_size", message))
        kept = engine.reshard_after_forward
        if not isinstance(kept, bool) and not world_size % shard and shard % kept:
            message = f"{kept} does not divide the {shard} ranks of a shard group: use true, false or a divisor"
            problems.append(Problem("engine.reshard_after_forward", message))
    if isinstance(engine, DeepSpeedEngine) and engine.zero_plus_plus is not None:
        secondary = engine.zero_plus_plus.hpz_partition_size
        if world_size % secondary:
            message = f"{secondary} does not divide the {world_size} ranks"
            problems.append(Problem("engine.zero_plus_plus.hpz_partition_size", message))
    return problems


def _of_cpu(recipe: Recipe) -> list[Problem]:
    problems = []
    if recipe.model.attention in _GPU_ATTENTION:
        message = f"{recipe.model.attention} has no backward on a CPU: use auto, sdpa or eager here"
        problems.append(Problem("model.attention", message))
    if recipe.engine.activation_offload:
        message = "the activations of a CPU are in host memory already: set it to false here"
        problems.append(Problem("engine.activation_offload", message))
    if recipe.precision == "fp16_mixed":
        problems.append(Problem("precision", "fp16_mixed has no CPU kernels: use bf16_mixed or fp32 here"))
    plus = recipe.engine.zero_plus_plus if isinstance(recipe.engine, DeepSpeedEngine) else None
    if plus is not None:
        quantised = {"quantized_weights": plus.quantized_weights, "quantized_gradients": plus.quantized_gradients}
        problems += [
            Problem(
                f"engine.zero_plus_plus.{key}", "DeepSpeed's quantisation kernels are for GPUs: set it to false here"
            )
            for key, wanted in quantised.items()
            if wanted
        ]
    return problems
