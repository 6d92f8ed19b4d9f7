"""FSDP2 (arXiv 2304.11277): weights, gradients and optimizer sharded over the ranks, a decoder layer at a time.

A layer's whole weights are gathered for its forward and again for its backward, and its gradient is
summed and scattered in one go. What lies outside the layers (embeddings, last norm, head) is one more
unit, gathered by the decoder's own forward.
"""

import functools
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as internals
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ByRows
from torch.torch_version import TorchVersion

from llmtrain.contracts import Shard, StepResult
from llmtrain.distributed import World
from llmtrain.engines.parts import (
    AveragedWeights,
    build_adamw,
    forward_precision,
    prepare_layers,
    set_learning_rate,
    trained_state,
    wanted,
)
from llmtrain.errors import InputError, TrainingError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.hub import MODEL_DTYPE
from llmtrain.recipe.schema import FSDPEngine as Options
from llmtrain.recipe.schema import Recipe

log = logging.getLogger(__name__)

# Before 2.13 an expert without tokens on one rank only ends the run.
_HAS_UNUSED = TorchVersion(torch.__version__) >= "2.13"
_MESH_INFO = "_get_post_forward_mesh_info"  # of torch's own: see _one_mesh_to_reshard_to


class FSDPEngine:
    """A trained model, sharded."""

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        self.device = world.device
        self._precision = recipe.precision
        self._clip_norm = recipe.optimizer.clip_norm
        blueprint.decoder.train()
        prepare_layers(blueprint.decoder, recipe.engine)
        self._sharded = shard(blueprint, recipe, world)
        self.model: nn.Module = self._sharded.decoder
        self._synchronises = True
        # Taken once, while every parameter is its shard.
        self._optimizer = build_adamw(self.model, recipe.optimizer)
        self._trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        local = {name: _local(p) for name, p in self._trained.items()}
        weights = {name: tensor for name, tensor in local.items() if tensor.numel()}
        self._averaged = None if recipe.ema is None else AveragedWeights(weights, recipe.ema.decay)
        log.info("engine: %s", self.describe())

    def describe(self) -> str:
        return self._sharded.describe()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; nothing is reduced before the last one.

        Until then each rank keeps its own gradient of the whole model: memory for traffic.
        """
        if last != self._synchronises:
            self._sharded.decoder.set_requires_gradient_sync(last)
            self._synchronises = last
        with forward_precision(self._precision, self.device):
            yield

    def backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Clips by the global norm and steps; a step whose norm is not finite changes nothing."""
        self._sharded.reshard()
        grads = [_local(p.grad) for p in self._trained.values() if p.grad is not None]
        norm = self._sharded.global_norm(grads)
        grad_norm = norm.item()
        applied = bool(torch.isfinite(norm))
        if applied:
            if self._clip_norm is not None and grad_norm > self._clip_norm:
                torch._foreach_mul_(grads, (self._clip_norm / (norm + 1e-6)).to(grads[0].device))
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            if self._averaged is not None:
                self._averaged.update()
        self._optimizer.zero_grad()
        return StepResult(grad_norm, applied)

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[None]:
        self.model.eval()
        average = self._averaged.swapped_in() if averaged and self._averaged is not None else nullcontext()
        try:
            precision = forward_precision(self._precision, self.device)
            with average, self._sharded.gathered_afresh(), torch.no_grad(), precision:
                yield
        finally:
            self.model.train()

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights where EMA is on, the trained ones otherwise."""
        averages = {} if self._averaged is None else self._averaged.averages
        # by identity and not by name: a tied head has a name of its own
        average_of = {id(p): averages[name] for name, p in self._trained.items() if name in averages}
        yield from self._sharded.whole(average_of, names)

    def state(self) -> dict[str, Shard]:
        """This rank's rows of what is trained and of its optimizer state; small tensors may have none here."""
        self._sharded.reshard()
        state = {}
        for name, tensor in trained_state(self._sharded.decoder, self._optimizer):
            state[name] = self._sharded.run_of(tensor, _local(tensor))
        if self._averaged is not None:
            for name, average in self._averaged.averages.items():
                state[f"ema.{name}"] = self._sharded.run_of(self._trained[name], average)
            state["ema_updates"] = self._sharded.run_of(self._averaged.num_updates, self._averaged.num_updates)
        return {name: run for name, run in state.items() if run.local.numel()}

    def state_loaded(self) -> None:
        """The next forward gathers what was written."""
        self._sharded.reshard()


class FSDPFrozen:
    """A model that is only asked, sharded."""

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        self._device, self._precision = world.device, recipe.precision
        blueprint.decoder.eval().requires_grad_(False)
        self._sharded = shard(blueprint, recipe, world)
        self.model: nn.Module = self._sharded.decoder

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self._sharded.gathered_afresh(), torch.no_grad(), forward_precision(self._precision, self._device):
            yield

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        yield from self._sharded.whole({}, names)


class Sharded:
    """A decoder under `fully_shard`, and what is asked of it whether it is trained or not."""

    def __init__(self, decoder: Any, mesh: DeviceMesh, recipe: Recipe, world: World):
        self.decoder = decoder  # a Decoder and an FSDPModule
        self._mesh, self._device = mesh, world.device
        self._recipe, self._world = recipe, world
        self._modules = [module for module in decoder.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            # The loss is a share of a sum over the ranks, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        # A weight that some ranks' inputs pass by counts as zero there; without, the ranks would reduce
        # buffers of different lengths.
        if _HAS_UNUSED:
            self.decoder.set_reduce_scatter_unused_params(True)

    def reshard(self) -> None:
        """Frees every gathered weight; the module's parameters are the shards again."""
        for module in self._modules:
            module.reshard()

    @contextmanager
    def gathered_afresh(self) -> Iterator[None]:
        """Forwards inside gather the weights as they are now, and leave nothing gathered behind.

        Without a backward nobody else would reshard: clipping and the optimizer would miss the gathered
        weights, and the next forward would use them as they were.
        """
        self.reshard()
        try:
            yield
        finally:
            self.reshard()

    def global_norm(self, tensors: list[Tensor]) -> Tensor:
        """L2 norm, in float32, of what the ranks hold of these together."""
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(tensors, 2, torch.float32))
            square += norms.double().square().sum().to(self._device)
        dist.all_reduce(square, group=self._mesh.get_group("shard"))
        return square.sqrt().float()

    def whole(self, instead: dict[int, Tensor], names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) one after another; `instead` gives other rows for a parameter, by its id()."""
        self.reshard()
        for name, tensor in wanted(self.decoder, names):
            yield name, self._gathered(tensor, instead.get(id(tensor)))

    @torch.no_grad()
    def _gathered(self, tensor: Tensor, local: Tensor | None) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        local = tensor.to_local() if local is None else local
        # Through the compute device: with offload the rows lie where nccl does not read.
        rows = DTensor.from_local(
            local.to(self._device, tensor.dtype),
            self._mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return rows.full_tensor()

    def run_of(self, tensor: Tensor, local: Tensor) -> Shard:
        """Where `local`, this rank's part of `tensor`, belongs."""
        if not isinstance(tensor, DTensor):
            return Shard(local, 0, tuple(tensor.shape), self._world.rank, self._world.size)
        num_rows, shards = tensor.shape[0], self._mesh["shard"].size()
        rows = -(-num_rows // shards)  # of each rank but the last ones
        first = min(self._mesh.get_local_rank("shard") * rows, num_rows)
        assert local.shape[0] == min(rows, num_rows - first), "FSDP cut the rows in another way"
        replica, replicas = 0, 1
        if "replicate" in (self._mesh.mesh_dim_names or ()):
            replica, replicas = self._mesh.get_local_rank("replicate"), self._mesh["replicate"].size()
        row = math.prod(tensor.shape[1:])  # by its shape: to index a DTensor is a collective
        return Shard(local, first * row, tuple(tensor.shape), replica, replicas)

    def describe(self) -> str:
        sizes = " x ".join(str(size) for size in self._mesh.shape)
        layout = f"{sizes} ranks (replicate x shard)" if self._mesh.ndim == 2 else f"{sizes} ranks"
        kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        offloaded = ", weights in host memory" if _options(self._recipe).cpu_offload else ""
        return f"fsdp: {layout} on {kind}, {self._recipe.precision}{offloaded}"

    def check(self, blueprint: Blueprint) -> None:
        """Raises TrainingError where what runs is not what the recipe asked for."""
        options = _options(self._recipe)
        shards = options.shard_size or self._world.size
        wanted_mesh = {"shard": shards}
        wanted_placements: tuple[Placement, ...] = (ByRows(0),)
        if shards < self._world.size:
            wanted_mesh = {"replicate": self._world.size // shards, "shard": shards}
            wanted_placements = (Replicate(), ByRows(0))
        wanted_device = torch.device("cpu") if options.cpu_offload else self._device
        dtype = MODEL_DTYPE[self._recipe.precision]
        wrong = []
        if (mesh := dict(zip(self._mesh.mesh_dim_names or (), self._mesh.shape, strict=True))) != wanted_mesh:
            wrong.append(f"the ranks are {mesh} and not {wanted_mesh}")
        for index, layer in enumerate(blueprint.layers):
            if not isinstance(layer, FSDPModule):
                wrong.append(f"layer {index} is no unit of its own")
        for name, parameter in self.decoder.named_parameters():
            if not isinstance(parameter, DTensor) or parameter.device_mesh != self._mesh:
                wrong.append(f"{name} is not sharded over the ranks")
            elif parameter.placements != wanted_placements:
                wrong.append(f"{name} is cut as {parameter.placements} and not {wanted_placements}")
            elif parameter.to_local().device != wanted_device:
                wrong.append(f"{name} is on {parameter.to_local().device} and not on {wanted_device}")
            elif parameter.requires_grad and parameter.dtype != dtype:
                wrong.append(f"{name} is {parameter.dtype} and not {dtype}")
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise TrainingError(f"engine fsdp does not run as asked: {wrong[0]}{more}")


def shard(blueprint: Blueprint, recipe: Recipe, world: World) -> Sharded:
    """Materialises and shards one layer after another, then the rest: no rank ever holds the whole model.

    Raises:
        InputError: the model cannot be sharded so.
        TrainingError: what came out is not what was asked for.
    """
    options, decoder = _options(recipe), blueprint.decoder
    _check_model(blueprint)
    mesh = _mesh(dist.group.WORLD, world.device.type, options.shard_size or world.size, options.timeout_seconds)
    settings: dict[str, Any] = {"mesh": mesh}
    if recipe.precision == "bf16_mixed":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if options.cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    with _one_mesh_to_reshard_to(options, mesh):
        for layer in blueprint.layers:
            blueprint.materialise(layer, world.device)
            fully_shard(layer, reshard_after_forward=options.reshard_after_forward, **settings)
    blueprint.materialise(decoder, world.device)
    # Its backward begins where its forward ends, so it keeps its weights in between. After a forward
    # without a backward they have to be freed by hand: see `Sharded.gathered_afresh`.
    fully_shard(decoder, reshard_after_forward=False, **settings)
    _prefetch(decoder, blueprint.layers, options.prefetch)
    sharded = Sharded(decoder, mesh, recipe, world)
    sharded.check(blueprint)
    return sharded


def _options(recipe: Recipe) -> Options:
    assert isinstance(recipe.engine, Options)
    return recipe.engine


@functools.lru_cache(maxsize=1)
def _mesh(everyone: dist.ProcessGroup, device: str, shards: int, timeout_seconds: int) -> DeviceMesh:
    """The ranks as (shard), or as (replicate, shard); one for all models, as each has communicators of its own."""
    size = everyone.size()
    if shards == size:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    return _with_deadline(mesh, timeout_seconds)


def _with_deadline(mesh: DeviceMesh, timeout_seconds: int) -> DeviceMesh:
    """torch gives the groups that it makes a deadline of its own."""
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    return mesh


@functools.lru_cache(maxsize=1)
def _mesh_to_reshard_to(mesh: DeviceMesh, size: int, timeout_seconds: int) -> DeviceMesh:
    """Neighbouring ranks in groups of `size`."""
    return _with_deadline(DeviceMesh(mesh.device_type, mesh.mesh.view(-1, size)), timeout_seconds)


@contextmanager
def _one_mesh_to_reshard_to(options: Options, mesh: DeviceMesh) -> Iterator[None]:
    """For a number in reshard_after_forward `fully_shard` makes new process groups for every layer.

    Hundreds of communicators cost more GPU memory than the option can save, so all layers are given
    the same.
    """
    kept = options.reshard_after_forward
    if isinstance(kept, bool) or kept in (1, mesh["shard"].size()):  # which mean false and true
        yield
        return
    info = HSDPMeshInfo(
        _mesh_to_reshard_to(mesh, kept, options.timeout_seconds), shard_mesh_dim=1, replicate_mesh_dim=0
    )
    names = vars(internals)
    original = names[_MESH_INFO]
    names[_MESH_INFO] = lambda *_: info
    try:
        yield
    finally:
        names[_MESH_INFO] = original


def _check_model(blueprint: Blueprint) -> None:
    """Raises InputError where FSDP would part what belongs together, or has nothing to cut."""
    decoder = blueprint.decoder
    inside = {module for layer in blueprint.layers for module in layer.modules()}
    outside = [module for module in decoder.modules() if module not in inside]
    owner: dict[nn.Parameter, int] = {}
    units = [*(layer.parameters() for layer in blueprint.layers), (p for m in outside for p in m.parameters(False))]
    shared = {p for index, unit in enumerate(units) for p in unit if owner.setdefault(p, index) != index}
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 0:
            problem = f"has a parameter without dimensions, {name}, which has no rows"
        elif parameter in shared:
            problem = f"shares weights of {name} between layers, which would be sharded apart"
        else:
            continue
        raise InputError(f"{type(decoder.hf).__name__} {problem}", where="engine.kind", remedy="use ddp or deepspeed")


def _prefetch(decoder: Any, layers: list[Any], ahead: int) -> None:
    """Each unit gathers the weights of the next `ahead` layers, too."""
    if ahead == 0:
        return
    decoder.set_modules_to_forward_prefetch(layers[:ahead])
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - ahead) : index][::-1])


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
