"""DeepSpeed's configuration, made from the recipe and a DeepSpeed JSON of the user's own.

The recipe decides what is trained; the user's file adds settings that the recipe does not have
(bucket sizes, prefetching, tracing). Where a file repeats something that the recipe decides, it
must say the same, or "auto". This reads and compares; it imports neither torch nor deepspeed.
Keys are those of DeepSpeed 0.19: https://www.deepspeed.ai/docs/config-json/
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import nearest
from llmtrain.recipe.batch import plan_batch
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import Cosine, DeepSpeedEngine, Recipe, ZeroPlusPlus

# What a user's file may set freely; a mapping is a section. What is not here, and is no claim of
# the recipe's either, is refused: DeepSpeed would ignore it, or train something else.
_FREE: Mapping[str, Any] = {
    "aio": None,
    "bf16": {"immediate_grad_update": None},
    "comet": None,
    "comms_logger": None,
    "csv_monitor": None,
    "data_types": {},
    "disable_python_gc": None,
    "dump_state": None,
    "flops_profiler": None,
    "fp16": dict.fromkeys(
        ("consecutive_hysteresis", "hysteresis", "initial_scale_power", "loss_scale_window", "min_loss_scale")
    ),
    "log_level": None,
    "memory_breakdown": None,
    "optimizer": {"params": {}},
    "scheduler": {"params": {}},
    "steps_per_print": None,
    "tensorboard": None,
    "timers": None,
    "torch_autocast": {},
    "wall_clock_breakdown": None,
    "wandb": None,
    "zero_optimization": {
        **dict.fromkeys(
            (
                "allgather_bucket_size",
                "allgather_partitions",
                "contiguous_gradients",
                "enable_sanity_checks",
                "ignore_unused_parameters",
                "leaf_module",
                "log_trace_cache_warnings",
                "memory_efficient_linear",
                "override_module_apply",
                "overlap_comm",
                "parameter_alignment",
                "reduce_bucket_size",
                "reduce_scatter",
                "round_robin_gradients",
                "stage3_allgather_sequential",
                "stage3_gather_16bit_weights_on_model_save",  # in many files; concerns DeepSpeed's own export
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_model_persistence_threshold",
                "stage3_module_granularity_threshold",
                "stage3_param_persistence_threshold",
                "stage3_prefetch_bucket_size",
                "stage3_use_all_reduce_for_fetch_params",
                "sub_group_size",
                "use_multi_rank_bucket_allreduce",
            )
        ),
        "offload_optimizer": dict.fromkeys(
            ("buffer_count", "fast_init", "pin_memory", "pipeline_read", "pipeline_write")
        ),
        "offload_param": dict.fromkeys(("buffer_count", "buffer_size", "max_in_cpu", "pin_memory")),
    },
}

# Keys that many files have and that the recipe says in its own words.
_INSTEAD: Mapping[str, str] = {
    "activation_checkpointing": "use engine.activation_checkpointing of the recipe",
    "amp": "use precision of the recipe",
    "bfloat16": "it is called bf16, and precision of the recipe decides it",
    "compile": "use engine.compile of the recipe",
    "zero_optimization.cpu_offload": "use engine.offload_optimizer of the recipe",
    "zero_optimization.cpu_offload_param": "use engine.offload_parameters of the recipe",
    "zero_optimization.cpu_offload_params": "use engine.offload_parameters of the recipe",
}

_SCHEDULER_OF_KIND = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}


@dataclass(frozen=True)
class _Claim:
    """What a key of DeepSpeed's must be, and who says so; unknown while it depends on the number of ranks."""

    value: Any
    said: str
    known: bool = True


def check_deepspeed_json(recipe: Recipe, world_size: int | None = None) -> None:
    """Raises RecipeError, with all that is wrong, where the user's own JSON cannot be used with the recipe.

    Args:
        world_size: ranks; None where it is not known yet, and sizes that depend on it are not compared.
    """
    _user_settings(recipe, world_size, None)


def deepspeed_config(recipe: Recipe, world_size: int, device: str, hidden_size: int | None) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: DeepSpeed's defaults under the user's settings under the recipe.

    One micro-batch is one backward of ours, so DeepSpeed is told micro batches and accumulation of 1:
    the loop sums and divides, and knows the boundary.

    Args:
        device: "cpu" or "cuda".
        hidden_size: of the model; fills "auto" bucket sizes as Hugging Face's integration does.

    Raises:
        RecipeError: the user's file cannot be read or contradicts the recipe.
    """
    settings: dict[str, Any] = {"timers": {"throughput": {"enabled": False}}, "steps_per_print": None}
    # DeepSpeed all-reduces gradients that only their owner needs where a bucket has several: 3P in place of 2P.
    settings["zero_optimization"] = {"use_multi_rank_bucket_allreduce": False}
    if device == "cpu":
        settings["zero_optimization"]["overlap_comm"] = False  # there is no second stream to overlap in
    _merge(settings, _user_settings(recipe, world_size, hidden_size))
    _merge(settings, _decided(recipe))
    return settings


def _engine(recipe: Recipe) -> DeepSpeedEngine:
    assert isinstance(recipe.engine, DeepSpeedEngine)
    return recipe.engine


def _decided(recipe: Recipe) -> dict[str, Any]:
    """What the recipe and llmtrain decide, as DeepSpeed wants it."""
    engine = _engine(recipe)
    plus = engine.zero_plus_plus or ZeroPlusPlus()
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "zero_hpz_partition_size": plus.hpz_partition_size,
        "zero_quantized_weights": plus.quantized_weights,
        "zero_quantized_gradients": plus.quantized_gradients,
    }
    for section, where in (
        ("offload_optimizer", engine.offload_optimizer),
        ("offload_param", engine.offload_parameters),
    ):
        if where != "none":
            path = {} if engine.nvme_path is None else {"nvme_path": os.path.expanduser(engine.nvme_path)}
            zero[section] = {"device": where, **path}
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # In stage 0 the engine reduces in the last backward, and the norm is ours to look at before the step.
        "managed_gradient_accumulation": engine.zero_stage == 0,
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else recipe.optimizer.clip_norm or 0.0,
        # The optimizer is torch's AdamW, on a CPU too: DeepSpeed's own compiles for minutes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if not plus.quantized_gradients:
        decided["communication_data_type"] = "fp32"
    if recipe.precision in ("bf16_mixed", "fp16_mixed"):
        decided["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.precision == "bf16_mixed":
        decided["bf16"] = {"enabled": True}
    elif recipe.precision == "fp16_mixed":
        decided["fp16"] = {"enabled": True, "loss_scale": engine.loss_scale or 0}
    elif recipe.precision == "bf16_autocast":
        # DeepSpeed turns an autocast from outside off. No "safe" modules: their gradients would be reduced in bf16.
        decided["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return decided


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Lays `above` over `below`, section by section."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


# ------------------------------------------------------------------------------------ the user's file


def _user_settings(recipe: Recipe, world_size: int | None, hidden_size: int | None) -> dict[str, Any]:
    """The further settings of the user's JSON, without what only repeats the recipe; empty without a file."""
    name = _engine(recipe).config
    if name is None:
        return {}
    file = Path(name).expanduser()
    written = _read(file)
    problems: list[Problem] = []
    claims = {**_claims(recipe), **_batch_claims(recipe, world_size)}
    settings = _further(written, _FREE, "", claims, _auto_values(hidden_size), f"{file}: ", problems)
    if problems:
        raise RecipeError(recipe.name, problems)
    return settings


def _read(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands twice in one section")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    def error(place: str, message: str) -> RecipeError:
        return RecipeError(str(file), [Problem(place, message)])

    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise error("engine.config", f"{file} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error("engine.config", f"{file} is not UTF-8 text") from None
    try:
        written = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as problem:
        raise error(f"{file}:{problem.lineno}", f"no JSON: {problem.msg}") from None
    except ValueError as problem:
        raise error(str(file), str(problem)) from None
    if not isinstance(written, dict):
        raise error(str(file), "a DeepSpeed configuration is a JSON object")
    return written


def _further(
    written: Mapping[str, Any],
    free: Mapping[str, Any],
    prefix: str,
    claims: Mapping[str, _Claim],
    autos: Mapping[str, Any],
    file: str,
    problems: list[Problem],
) -> dict[str, Any]:
    """The settings in `written` that add something; what contradicts or is unknown becomes a problem."""
    settings: dict[str, Any] = {}
    for key, value in written.items():
        path = prefix + key
        if (claim := claims.get(path)) is not None:
            if value != "auto" and claim.known and not _same(value, claim.value):
                message = f"{json.dumps(value)} contradicts {claim.said}: make them equal, or take this key out"
                problems.append(Problem(file + path, message))
        elif key not in free:
            problems.append(Problem(file + path, _refusal(path, key, free, prefix, claims)))
        elif (section := free[key]) is not None:
            if isinstance(value, dict):
                inner = _further(value, section, f"{path}.", claims, autos, file, problems)
                settings |= {key: inner} if inner else {}
            else:
                problems.append(Problem(file + path, f"expected a section {{...}}, got {json.dumps(value)}"))
        elif value != "auto":
            settings[key] = value
        elif path in autos:
            settings[key] = autos[path]
    return settings


def _refusal(path: str, key: str, free: Mapping[str, Any], prefix: str, claims: Mapping[str, _Claim]) -> str:
    if path in _INSTEAD:
        return f"not served here: {_INSTEAD[path]}"
    siblings = [claim.removeprefix(prefix) for claim in claims if claim.startswith(prefix)]
    known = [*free, *(name for name in siblings if "." not in name)]
    return f"not among the settings that llmtrain passes on to DeepSpeed{nearest(key, known)}; take it out"


def _same(written: Any, decided: Any) -> bool:
    """Equal as JSON values: 1 is 1.0 but not true; lists by element."""
    if isinstance(written, bool) or isinstance(decided, bool):
        return written is decided
    if isinstance(written, str) and isinstance(decided, str):
        return written.lower() == decided.lower()
    return bool(written == decided)


def _auto_values(hidden_size: int | None) -> dict[str, int]:
    """What "auto" means where the recipe says nothing, by Hugging Face's convention; elsewhere DeepSpeed's default."""
    if hidden_size is None:
        return {}
    return {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size * hidden_size * 9 // 10,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }


# ---------------------------------------------------------------------------------- what it may repeat


def _claims(recipe: Recipe) -> dict[str, _Claim]:
    """Keys of DeepSpeed's that the recipe or llmtrain decides, dotted."""
    claims = {path: _Claim(value, f"llmtrain, which needs {json.dumps(value)}") for path, value in _own(recipe)}

    def decide(path: str, value: Any, key: str, in_recipe: Any) -> None:
        claims[path] = _Claim(value, f"{key}: {json.dumps(in_recipe)} of the recipe")

    engine, precision = _engine(recipe), recipe.precision
    plus = engine.zero_plus_plus or ZeroPlusPlus()
    zero = "zero_optimization."
    decide(zero + "stage", engine.zero_stage, "engine.zero_stage", engine.zero_stage)
    for section, key, where in (
        ("offload_optimizer", "engine.offload_optimizer", engine.offload_optimizer),
        ("offload_param", "engine.offload_parameters", engine.offload_parameters),
    ):
        decide(f"{zero}{section}.device", where, key, where)
        decide(f"{zero}{section}.nvme_path", engine.nvme_path, "engine.nvme_path", engine.nvme_path)
    for key in ("hpz_partition_size", "quantized_weights", "quantized_gradients"):
        value = plus.model_dump()[key]
        decide(f"{zero}zero_{key}", value, f"engine.zero_plus_plus.{key}", value)
    clip = recipe.optimizer.clip_norm
    decide("gradient_clipping", clip or 0.0, "optimizer.clip_norm", clip)
    for section, name in (("bf16", "bf16_mixed"), ("fp16", "fp16_mixed"), ("torch_autocast", "bf16_autocast")):
        decide(f"{section}.enabled", precision == name, "precision", precision)
    decide("torch_autocast.dtype", "bfloat16", "precision", precision)
    decide("fp16.loss_scale", engine.loss_scale or 0, "engine.loss_scale", engine.loss_scale)
    for path, value, key, said in (*_optimizer(recipe), *_scheduler(recipe)):
        decide(path, value, key, said)
    return claims


def _own(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What llmtrain needs whatever the recipe says."""
    yield "zero_allow_untested_optimizer", True
    yield "zero_force_ds_cpu_optimizer", False
    yield "managed_gradient_accumulation", _engine(recipe).zero_stage == 0
    yield "communication_data_type", "fp32"
    yield "data_types.grad_accum_dtype", "fp32"
    yield "bf16.check_grad_overflow", True
    yield "bf16.bf16_master_weights_and_grads", False
    yield "bf16.bf16_optimizer_states", False
    yield "fp16.auto_cast", False
    yield "fp16.fp16_master_weights_and_grads", False
    yield "torch_autocast.lower_precision_safe_modules", []
    yield "zero_optimization.compute_grad_norm", True
    if _engine(recipe).zero_stage < 2:
        yield "zero_optimization.overlap_comm", False  # accumulation of ours overlaps from stage 2 on


def _batch_claims(recipe: Recipe, world_size: int | None) -> dict[str, _Claim]:
    """Batch sizes, which DeepSpeed's files give as global, per rank, and per step."""
    declared = "tokens" if recipe.batch.sequences is None else "sequences"
    rows = recipe.global_sequences
    claims = {"train_batch_size": _Claim(rows, f"the recipe's {rows} rows (batch.{declared})")}
    micro, steps = recipe.batch.micro_sequences, None
    if world_size is not None:
        plan = plan_batch(recipe, world_size)
        micro, steps = plan.micro_sequences, plan.accumulation
    for path, number in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", steps)):
        said = f"the recipe's {number} (batch.{declared} and batch.micro_sequences, over {world_size} ranks)"
        claims[path] = _Claim(number, said, known=number is not None)
    return claims


def _optimizer(recipe: Recipe) -> Iterator[tuple[str, Any, str, Any]]:
    """(DeepSpeed's key, value, the recipe's key, what stands there)."""
    spec = recipe.optimizer
    yield "optimizer.type", spec.kind, "optimizer.kind", spec.kind
    yield "optimizer.params.adam_w_mode", True, "optimizer.kind", spec.kind
    for key, value in (("lr", spec.lr), ("betas", spec.betas), ("eps", spec.eps), ("weight_decay", spec.weight_decay)):
        yield f"optimizer.params.{key}", value, f"optimizer.{key}", value


def _scheduler(recipe: Recipe) -> Iterator[tuple[str, Any, str, Any]]:
    """As `_optimizer`; the schedule runs in llmtrain, and a file may only name the same one."""
    schedule, params = recipe.schedule, "scheduler.params."
    yield "scheduler.type", _SCHEDULER_OF_KIND.get(schedule.kind), "schedule.kind", schedule.kind
    yield params + "warmup_type", "linear", "schedule.kind", schedule.kind
    yield params + "warmup_min_lr", 0, "schedule.kind", schedule.kind
    yield params + "warmup_min_ratio", 0, "schedule.kind", schedule.kind
    yield params + "warmup_max_lr", recipe.peak_lr, "optimizer.lr", recipe.peak_lr
    yield params + "warmup_num_steps", schedule.warmup_steps, "schedule.warmup_steps", schedule.warmup_steps
    yield params + "total_num_steps", recipe.steps, "steps", recipe.steps
    if isinstance(schedule, Cosine):
        yield params + "cos_min_ratio", schedule.min_ratio, "schedule.min_ratio", schedule.min_ratio
