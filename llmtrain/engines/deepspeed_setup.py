"""DeepSpeed brought up: the library for this device, its process group, ZeRO-3's shards, the check of what runs.

Measured on deepspeed 0.19.8; what is worked round here is said where it is done.
"""

import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from llmtrain.distributed import World
from llmtrain.engines.parts import Group, build_groups
from llmtrain.errors import InputError, TrainingError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.recipe.deepspeed_json import deepspeed_config
from llmtrain.recipe.schema import AdamW, DeepSpeedEngine, Recipe

log = logging.getLogger(__name__)

# A run of a parameter's elements in float32, and the index in the parameter of the first.
Originals = dict[str, tuple[int, Tensor]]

COMPUTE_DTYPE = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}  # float32 otherwise


def options_of(recipe: Recipe) -> DeepSpeedEngine:
    assert isinstance(recipe.engine, DeepSpeedEngine)
    return recipe.engine


@contextmanager
def brought_up(recipe: Recipe, world: World) -> Iterator[ModuleType]:
    """Imports deepspeed for this rank's device and joins it to the process group.

    Inside, an engine may be made; on leaving, the groups that DeepSpeed made get the recipe's deadline.

    Raises:
        InputError: deepspeed is not installed, or what the offload to NVMe needs is not there.
    """
    # Read when deepspeed is imported: without it, a GPU in the machine is taken even where the recipe says cpu.
    os.environ["DS_ACCELERATOR"] = world.device.type
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise InputError(
            "deepspeed is not installed", where="engine.kind", remedy="pip install 'llmtrain[deepspeed]'"
        ) from None
    accelerator = deepspeed.get_accelerator().device_name()
    if accelerator != world.device.type:
        raise InputError(
            f"this process has already loaded DeepSpeed for {accelerator}, and trains on {world.device.type}",
            where="device",
            remedy=f"start it with DS_ACCELERATOR={world.device.type} in its environment",
        )
    if world.device.type == "cpu":
        # DeepSpeed would compile its shared-memory collectives for minutes; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.handlers.clear()  # to stdout; its warnings go where ours go
    deepspeed.utils.logger.propagate = True
    # Said at each call: DeepSpeed calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    _check_nvme(deepspeed, options_of(recipe))
    deadline = timedelta(seconds=options_of(recipe).timeout_seconds)
    if not dist.is_initialized():
        # One process: DeepSpeed wants a group all the same.
        store = dist.HashStore()  # type: ignore[attr-defined]
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=deadline)
    _forget_old_groups(deepspeed)
    before = set(distributed_c10d._world.pg_map)
    # DeepSpeed asks for LOCAL_RANK now and while it trains, and not every launcher sets it. All four go together.
    ranks = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    os.environ.update({name: str(value) for name, value in (ranks | {"LOCAL_WORLD_SIZE": world.local_size}).items()})
    printed = io.StringIO()  # stage 1 in bf16 prints the memory in use
    with redirect_stdout(printed):
        yield deepspeed
    log.debug("deepspeed: %s", printed.getvalue())
    for group in set(distributed_c10d._world.pg_map) - before:
        # Stages 1 and 2 make their group with torch's own deadline, whatever was asked for.
        distributed_c10d._set_pg_timeout(deadline, group)


_last_group: dist.ProcessGroup | None = None


def _forget_old_groups(deepspeed: ModuleType) -> None:
    """DeepSpeed keeps the groups it made, also those of a process group that was left since."""
    global _last_group
    if _last_group is not None and _last_group is not dist.group.WORLD:
        deepspeed.utils.groups._release_process_group_references()
    _last_group = dist.group.WORLD


def _check_nvme(deepspeed: ModuleType, options: DeepSpeedEngine) -> None:
    offloads = {
        "engine.offload_optimizer": options.offload_optimizer,
        "engine.offload_parameters": options.offload_parameters,
    }
    keys = [key for key, where in offloads.items() if where == "nvme"]
    if not keys:
        return
    assert options.nvme_path is not None
    if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible():
        raise InputError(
            "offload to nvme needs DeepSpeed's asynchronous file access, which cannot be built here",
            where=keys[0],
            remedy="install libaio with its headers (libaio-dev, libaio-devel), ninja and a C++ compiler; or use cpu",
        )
    try:
        Path(options.nvme_path).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{options.nvme_path} is no directory to write to: {error.strerror}",
            where="engine.nvme_path",
            remedy="name a directory on the node's own disk",
        ) from None


def configuration(deepspeed: ModuleType, recipe: Recipe, world: World, decoder: Decoder) -> dict[str, Any]:
    """The recipe's DeepSpeed configuration, which DeepSpeed itself has accepted.

    Raises:
        InputError: the user's own JSON contradicts the recipe, or DeepSpeed refuses it.
    """
    hidden_size = config_field(decoder.hf.config, "hidden_size")
    config = deepspeed_config(recipe, world.size, world.device.type, hidden_size)
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(config))
    except (
        ValueError,
        TypeError,
        AssertionError,
        deepspeed.DeepSpeedConfigError,
    ) as error:  # pydantic's is a ValueError
        raise InputError(
            f"DeepSpeed {deepspeed.__version__} refuses its configuration: {error}",
            where=options_of(recipe).config or "engine",
            remedy="correct what it names",
        ) from None
    return config


def build_adamw(decoder: Decoder, groups: Sequence[Group], spec: AdamW) -> torch.optim.AdamW:
    """AdamW over the trained parameters, without state: DeepSpeed puts its flat partitions in their place."""
    parameters = dict(decoder.named_parameters())
    return torch.optim.AdamW(
        build_groups(groups, parameters), lr=0.0, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, fused=True
    )


def materialise(
    deepspeed: ModuleType | None,
    blueprint: Blueprint,
    world: World,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    groups: Sequence[Group],
) -> Originals:
    """Puts the decoder on the device a layer at a time, its parameters cast to `dtype`; buffers stay.

    In stage 3 a layer is partitioned before the next one is made.

    Args:
        deepspeed: None will do below stage 3.
        config: of the engine to be made.
        groups: of the optimizer, with all trained parameters; none where nothing is trained.

    Returns:
        What this rank will step of the trained parameters, as it was before it was cast: DeepSpeed
        would begin with float32 weights that were rounded to `dtype`.
    """
    decoder, stage = blueprint.decoder, config["zero_optimization"]["stage"]
    runs = _runs_of_stage_3(decoder, world) if stage == 3 else _runs_of_stage_1_and_2(decoder, groups, world, config)
    originals: Originals = {}
    ready: dict[str, nn.Parameter] = {}
    for module in [*decoder.layers(), decoder]:
        blueprint.materialise(module, world.device)
        fresh = {name: p for name, p in decoder.named_parameters() if name not in ready and not p.is_meta}
        for name, parameter in fresh.items():
            if parameter.dtype == dtype or not parameter.is_floating_point():
                continue
            if parameter.requires_grad:
                run = runs[name]
                originals[name] = (run.start, parameter.detach().flatten()[run.start : run.stop].float().clone())
            parameter.data = parameter.data.to(dtype)
        if deepspeed is not None and stage == 3:
            _partition(deepspeed, list(fresh.values()), next(iter(ready.values()), None), config)
        ready |= fresh
    if deepspeed is not None and stage == 3:
        _gather_together(deepspeed, blueprint)
    return originals


def _gather_together(deepspeed: ModuleType, blueprint: Blueprint) -> None:
    """Tells ZeRO-3 of weights that are read outside of the module that holds them."""
    decoder = blueprint.decoder
    embedding, head = decoder.hf.get_input_embeddings(), decoder.head
    # Losses use the head's weight without calling the head. Said now, or DeepSpeed finds out in some
    # forward, and the order of gathers that it has recorded is no longer true.
    external = set(head.parameters())
    indivisible = [m for m in decoder.modules() if type(m) in blueprint.indivisible]
    if embedding in indivisible:
        # Its input has no gradient, without which DeepSpeed reduces a leaf module before its backward.
        external |= set(embedding.parameters())
    for parameter in external:
        deepspeed.zero.register_external_parameter(decoder, parameter)
    inside = set(embedding.modules())
    leaves = [module for module in indivisible if module not in inside]
    for module in leaves:
        deepspeed.utils.set_z3_leaf_module(module, True)
    if leaves:
        # For the same reason: over a frozen embedding the first layer's input has none either.
        embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def _partition(
    deepspeed: ModuleType, parameters: list[nn.Parameter], earlier: Any | None, config: Mapping[str, Any]
) -> None:
    """Leaves each rank its ZeRO-3 shard of `parameters`, as was done with an `earlier` one."""
    if earlier is None:
        deepspeed.zero.Init(
            module=nn.ParameterList(parameters),
            config_dict_or_path=copy.deepcopy(dict(config)),
            zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
        )
    else:
        # So that one set of groups, and of files on NVMe, serves all.
        earlier.convert_to_zero_parameters(param_list=parameters)


def _runs_of_stage_3(decoder: Decoder, world: World) -> dict[str, range]:
    """Of each parameter the elements that this rank keeps: one of equal parts, the last padded."""
    runs = {}
    for name, parameter in decoder.named_parameters():
        size = -(-parameter.numel() // world.size)
        runs[name] = range(world.rank * size, min((world.rank + 1) * size, parameter.numel()))
    return runs


def _runs_of_stage_1_and_2(
    decoder: Decoder, groups: Sequence[Group], world: World, config: Mapping[str, Any]
) -> dict[str, range]:
    """Of each trained parameter the elements that this rank steps; all of them where the layout is not the usual one.

    A group's parameters lie one behind the other, padded to a multiple of twice the ranks, and are cut
    into equal parts.
    """
    trained = {name: p.numel() for name, p in decoder.named_parameters() if p.requires_grad}
    if {"round_robin_gradients", "parameter_alignment"} & config["zero_optimization"].keys():
        return {name: range(numel) for name, numel in trained.items()}
    runs = {}
    for group in groups:
        numels = {name: trained[name] for name in group.names}
        size = -(-sum(numels.values()) // (2 * world.size)) * 2
        place = 0
        for name, numel in numels.items():
            first, end = (max(0, min(edge * size - place, numel)) for edge in (world.rank, world.rank + 1))
            runs[name] = range(first, end)
            place += numel
    return runs


def verify(engine: Any, recipe: Recipe, world: World, num_local: int, masters: list[Tensor]) -> None:
    """Raises TrainingError where DeepSpeed does not run what the recipe asks for.

    Args:
        num_local: elements of trained parameters whose optimizer state this rank keeps.
        masters: the weights that its optimizer steps; none where they are swapped out.
    """
    options, dtype = options_of(recipe), COMPUTE_DTYPE.get(recipe.precision, torch.float32)
    trained: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
    offload = {key: config.device if config is not None else "none" for key, config in _offloads(engine).items()}
    master_device = "cpu" if options.offload_optimizer != "none" else world.device.type
    facts: list[tuple[str, Any, Any]] = [
        ("ZeRO stage", int(engine.zero_optimization_stage()), options.zero_stage),
        ("ranks", engine.dp_world_size, world.size),
        ("device", torch.device(engine.device).type, world.device.type),
        ("dtype of the weights", {p.dtype for p in trained}, {dtype}),
        ("dtype of the optimizer", {master.dtype for master in masters} or {torch.float32}, {torch.float32}),
        ("device of the optimizer", {m.device.type for m in masters} or {master_device}, {master_device}),
        ("autocast", bool(engine.torch_autocast_enabled()), recipe.precision == "bf16_autocast"),
        ("offload of the optimizer", offload["optimizer"], options.offload_optimizer),
        ("offload of the weights", offload["parameters"], options.offload_parameters),
    ]
    if options.zero_stage > 0:
        facts.append(("gradient clipping", engine.gradient_clipping(), recipe.optimizer.clip_norm or 0.0))
    # The shards tile the trained parameters: nothing is kept twice and nothing is left out.
    count = torch.tensor(num_local, device=world.device)
    dist.all_reduce(count)
    numel = sum(p.ds_numel if options.zero_stage == 3 else p.numel() for p in trained)
    facts.append(("elements in the optimizer", int(count), numel * (world.size if options.zero_stage == 0 else 1)))
    for what, runs, asked in facts:
        if runs != asked:
            raise TrainingError(f"DeepSpeed runs with {what} {runs}, and {asked} was asked for")


def _offloads(engine: Any) -> dict[str, Any]:
    return {"optimizer": engine.zero_offload_optimizer(), "parameters": engine.zero_offload_param()}


def describe(recipe: Recipe, world: World) -> str:
    options = options_of(recipe)
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    parts = [f"deepspeed: ZeRO-{options.zero_stage} over {world.size} rank{'s' * (world.size > 1)} on {kind}"]
    parts.append(recipe.precision)
    for what, where in (("optimizer", options.offload_optimizer), ("weights", options.offload_parameters)):
        if where != "none":
            parts.append(f"{what} on {where}")
    return ", ".join(parts)
