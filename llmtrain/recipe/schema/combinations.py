"""Settings that are right alone and impossible together, each with what to use instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.recipe.schema.engine import DeepSpeedEngine, FSDPEngine

if TYPE_CHECKING:
    from llmtrain.recipe.schema.recipe import Recipe


def contradiction(recipe: Recipe) -> str | None:
    """What cannot be, whatever the number of ranks; None where all fits."""
    return _of_precision(recipe) or (
        _of_deepspeed(recipe, recipe.engine) if isinstance(recipe.engine, DeepSpeedEngine) else None
    )


def _of_precision(recipe: Recipe) -> str | None:
    precision, engine = recipe.precision, recipe.engine
    if precision == "fp16_mixed":
        if recipe.device == "cpu":
            return "precision fp16_mixed has no CPU kernels; use bf16_mixed or fp32 with device cpu"
        if not isinstance(engine, DeepSpeedEngine):
            return (
                f"precision fp16_mixed needs a loss scale, which engine.kind {engine.kind} does not have; "
                "use bf16_mixed, or engine.kind deepspeed"
            )
    if precision == "bf16_mixed" and not isinstance(engine, FSDPEngine | DeepSpeedEngine):
        return (
            f"precision bf16_mixed needs sharded float32 weights beside the bf16 ones, which engine.kind "
            f"{engine.kind} does not keep; use bf16_autocast, or engine.kind fsdp or deepspeed"
        )
    if precision == "bf16" and isinstance(engine, DeepSpeedEngine):
        return "precision bf16 (bf16 optimizer state) is not DeepSpeed's; use bf16_mixed, or engine.kind fsdp or ddp"
    return None


def _of_deepspeed(recipe: Recipe, engine: DeepSpeedEngine) -> str | None:
    stage = engine.zero_stage
    if recipe.ema is not None:
        return (
            f"ema keeps an average of the full weights, which engine.zero_stage {stage} shards inside DeepSpeed; "
            "use engine.kind fsdp or ddp, or take ema away"
        )
    if stage == 0 and recipe.precision in ("bf16_mixed", "fp16_mixed"):
        return f"precision {recipe.precision} needs engine.zero_stage 1 or more; use stage 1, or bf16_autocast"
    if engine.offload_optimizer != "none" and stage == 0:
        return "engine.offload_optimizer needs engine.zero_stage 1 or more"
    if engine.offload_optimizer == "nvme" and stage != 3:
        return f"engine.offload_optimizer nvme needs engine.zero_stage 3, not {stage}; use cpu, or stage 3"
    if engine.offload_parameters != "none" and stage != 3:
        return f"engine.offload_parameters needs engine.zero_stage 3, not {stage}; use offload_optimizer, or stage 3"
    if "nvme" in (engine.offload_optimizer, engine.offload_parameters) and engine.nvme_path is None:
        return "engine.nvme_path is missing: name a directory on the node's own disk for the offload to nvme"
    if engine.zero_plus_plus is not None and stage != 3:
        return f"engine.zero_plus_plus needs engine.zero_stage 3, not {stage}"
    if engine.loss_scale is not None and recipe.precision != "fp16_mixed":
        return f"engine.loss_scale belongs to precision fp16_mixed, not {recipe.precision}; take it away"
    return None
