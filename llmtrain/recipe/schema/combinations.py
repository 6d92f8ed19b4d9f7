"""Settings that are right alone and impossible together, each with what to use instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.errors import nearest
from llmtrain.recipe.schema.adapter import PrefixTuning, PromptLearning
from llmtrain.recipe.schema.algorithm import DIFFUSION, BlockDiffusion, MaskedDiffusion, ScoreEntropy
from llmtrain.recipe.schema.data import RecordSource
from llmtrain.recipe.schema.engine import DeepSpeedEngine, FSDPEngine
from llmtrain.recipe.schema.figures import BETTER, held_out_figures
from llmtrain.recipe.schema.model import ModelFromPretrained
from llmtrain.recipe.schema.preference import REFERENCED

if TYPE_CHECKING:
    from llmtrain.recipe.schema.around import WatchedFigure
    from llmtrain.recipe.schema.recipe import Recipe


def contradiction(recipe: Recipe) -> str | None:
    """What cannot be, whatever the number of ranks; None where all fits."""
    return (
        _of_precision(recipe)
        or (_of_deepspeed(recipe, recipe.engine) if isinstance(recipe.engine, DeepSpeedEngine) else None)
        or _of_data(recipe)
        or _of_adapter(recipe)
        or _of_judged(recipe)
        or (_of_diffusion(recipe, recipe.algorithm) if isinstance(recipe.algorithm, DIFFUSION) else None)
        or _of_figure(recipe, "early_stopping", recipe.early_stopping)
        or _of_figure(recipe, "checkpoint.keep_best", recipe.checkpoint.keep_best)
    )


def _of_data(recipe: Recipe) -> str | None:
    if recipe.fine_tunes:
        return None
    data, kind = recipe.data, recipe.algorithm.kind
    for key in ("chat_template", "train_on", "max_empty_share"):
        if dict(data)[key] != type(data).model_fields[key].default:
            return f"data.{key} is for fine-tuning, not {kind} of texts; take it away, or use algorithm.kind: sft"
    if data.overflow == "truncate" and recipe.packing != "best_fit":
        return f"data.overflow truncate is for packing best_fit and for algorithm sft; {kind} splits long documents"
    for source in [*data.train, *(data.validation or [])]:
        if isinstance(source, RecordSource) and (source.columns or source.format not in ("auto", "text")):
            return f"format and columns of a data source are for algorithm sft; {kind} reads `field`"
    return None


def _of_judged(recipe: Recipe) -> str | None:
    """Of answers that were judged, and of models that score."""
    data, algorithm, kind = recipe.data, recipe.algorithm, recipe.algorithm.kind
    if isinstance(algorithm, REFERENCED) and algorithm.reference == "adapter_off" and recipe.adapter is None:
        return "algorithm.reference adapter_off needs an adapter to switch off; give one, or use cached"
    if recipe.samples is not None and recipe.scores:
        return f"samples are texts, and {kind} trains a model that scores and writes none; take samples away"
    if not (recipe.compares or recipe.scores):
        return None
    if data.packing == "documents":
        return f"data.packing documents would cut answers apart, which {kind} judges as wholes; use best_fit or none"
    if data.overflow != "auto":
        return f"data.overflow is not for {kind}: answers are judged as wholes, and those that do not fit are left out"
    if data.train_on == "all":
        return f"data.train_on all would count prompts, which are not judged by {kind}; use assistant"
    if recipe.shares_prompts and isinstance(recipe.adapter, PromptLearning):
        return f"adapter {recipe.adapter.kind} goes before each document; set algorithm.share_prompts: false"
    if recipe.shares_prompts and recipe.model.attention == "flash_attention_2":
        return (
            "model.attention flash_attention_2 takes no mask, which shared prompts need; set algorithm.share_prompts: "
            "false, or use auto or flex_attention"
        )
    return None


def _of_adapter(recipe: Recipe) -> str | None:
    model, adapter = recipe.model, recipe.adapter
    if isinstance(adapter, PromptLearning) and recipe.scores:
        return (
            f"adapter {adapter.kind} is saved with no other module, and {recipe.algorithm.kind} trains a head that "
            "scores, too; use adapter lora or ia3"
        )
    if isinstance(adapter, PrefixTuning) and recipe.packing != "none":
        return (
            "adapter prefix_tuning puts keys before the row that every document in it would see; set data.packing: none"
        )
    if not isinstance(model, ModelFromPretrained) or model.quantization == "none":
        return None
    if adapter is None:
        return "model.quantization freezes the weights; give an adapter to train, such as adapter: {kind: lora}"
    if isinstance(recipe.engine, FSDPEngine) or (
        isinstance(recipe.engine, DeepSpeedEngine) and recipe.engine.zero_stage == 3
    ):
        return (
            "model.quantization keeps weights in a form that cannot be sharded here; use engine.kind ddp, or deepspeed "
            "with zero_stage 1 or 2, and engine.activation_checkpointing for memory"
        )
    return None


def _of_diffusion(recipe: Recipe, algorithm: MaskedDiffusion | BlockDiffusion | ScoreEntropy) -> str | None:
    if isinstance(recipe.adapter, PromptLearning):
        return (
            f"adapter {recipe.adapter.kind} puts tokens before causal text, and {algorithm.kind} attends both ways; "
            "use adapter lora"
        )
    if recipe.model.attention == "flash_attention_2":
        return (
            f"model.attention flash_attention_2 knows causal attention only, which {algorithm.kind} does not have; use "
            "auto, or on GPUs flex_attention"
        )
    return _of_blocks(recipe, algorithm) if isinstance(algorithm, BlockDiffusion) else None


def _of_blocks(recipe: Recipe, algorithm: BlockDiffusion) -> str | None:
    largest = max([algorithm.block_size, *(stage.block_size for stage in algorithm.curriculum)])
    if largest > recipe.sequence_length:
        return (
            f"algorithm.block_size {largest} is more than sequence_length {recipe.sequence_length}, so that no row "
            "has a whole block; use smaller blocks or longer rows"
        )
    last = algorithm.curriculum[-1].from_step if algorithm.curriculum else 0
    if recipe.steps is not None and last >= recipe.steps:
        return (
            f"algorithm.curriculum comes to blocks of {algorithm.block_size} at step {last}, and the run ends "
            f"after {recipe.steps} steps; begin them earlier, or leave them out"
        )
    if algorithm.clip is not None and algorithm.block_size == 1:
        return "algorithm.clip has no meaning for blocks of one token, whose loss does not depend on the rate"
    if algorithm.clip == "search" and recipe.data.validation is None and recipe.data.validation_fraction == 0:
        return "algorithm.clip search measures on held-out rows; give data.validation or validation_fraction"
    return None


def _of_figure(recipe: Recipe, key: str, watched: WatchedFigure | None) -> str | None:
    """Of a held-out figure that decides when the run ends, or which checkpoint is its best."""
    if watched is None:
        return None
    if recipe.data.validation is None and recipe.data.validation_fraction == 0:
        return f"{key} looks at held-out rows, and there are none; give data.validation or data.validation_fraction"
    metric, mode, known = watched.metric, watched.mode, BETTER.get(watched.metric)
    there = held_out_figures(recipe.algorithm)
    if metric not in there:
        return (
            f"{key}.metric {metric!r} is no held-out figure of {recipe.algorithm.kind}{nearest(metric, there)}; there "
            f"are: {', '.join(there)}"
        )
    if known is None and mode is None:
        return f"{key}.metric {metric}: it is not known whether less or more of it is better; give mode: min or max"
    if known is not None and mode not in (None, known):
        return (
            f"{key}.mode {mode} would take the worst for the best: {'less' if known == 'min' else 'more'} {metric} is "
            "better; take mode away"
        )
    return None


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
