"""Engines that hold the whole model on each rank: one process, and DistributedDataParallel."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import Recipe

log = logging.getLogger(__name__)


class ReplicatedEngine:
    """Whole model, gradient and optimizer on every rank; gradients are summed over ranks, if several.

    With one process there is nothing to reduce, and the model runs as it is.
    """

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        self.device = world.device
        self._world = world
        self._precision = recipe.precision
        self._clip_norm = recipe.optimizer.clip_norm
        self._decoder = decoder = blueprint.decoder
        blueprint.materialise(decoder, world.device)
        decoder.train()
        prepare_layers(decoder, recipe.engine)
        self._optimizer = build_adamw(decoder, recipe.optimizer)
        trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        self._parameters = list(trained.values())
        self._averaged = None if recipe.ema is None else AveragedWeights(trained, recipe.ema.decay)
        self.model: nn.Module = decoder if world.size == 1 else self._wrapped(decoder)
        log.info("engine: %s", self.describe())

    def _wrapped(self, decoder: Decoder) -> DistributedDataParallel:
        return DistributedDataParallel(
            decoder,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,  # rotary tables are equal on all ranks
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )

    def describe(self) -> str:
        backend = "single process" if self._world.size == 1 else f"ddp over {self._world.size} ranks"
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{backend} on {kind}, {self._precision}"

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; DDP reduces in the last one only."""
        hold = nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()
        with hold, forward_precision(self._precision, self.device):
            yield

    def backward(self, loss: Tensor) -> None:
        # DDP averages over ranks; the loss is a share of a sum, so the average is multiplied back.
        with torch.autocast(self.device.type, enabled=False):
            (loss * self._world.size).backward()

    def step(self, lr: float) -> StepResult:
        """Clips by the global norm and steps; a step whose norm is not finite changes nothing."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        grad_norm = norm.item()
        applied = bool(torch.isfinite(norm))
        if applied:
            if self._clip_norm is not None and grad_norm > self._clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm, foreach=True)
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            if self._averaged is not None:
                self._averaged.update()
        self._optimizer.zero_grad(set_to_none=not isinstance(self.model, DistributedDataParallel))
        return StepResult(grad_norm, applied)

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[None]:
        self.model.eval()
        average = self._averaged.swapped_in() if averaged and self._averaged is not None else nullcontext()
        try:
            with average, torch.no_grad(), forward_precision(self._precision, self.device):
                yield
        finally:
            self.model.train()

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights where EMA is on, the trained ones otherwise."""
        averages = {} if self._averaged is None else self._averaged.averages
        # by identity and not by name: a tied head has a name of its own
        average_of = {id(p): averages[name] for name, p in self._decoder.named_parameters() if name in averages}
        for name, tensor in wanted(self._decoder, names):
            average = average_of.get(id(tensor))
            yield name, tensor.detach() if average is None else average.to(tensor.dtype)

    def state(self) -> dict[str, Shard]:
        """Whole tensors; every rank holds the same."""
        tensors = dict(trained_state(self._decoder, self._optimizer))
        if self._averaged is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self._averaged.averages.items()}
            tensors["ema_updates"] = self._averaged.num_updates
        rank, size = self._world.rank, self._world.size
        return {name: Shard(tensor, 0, tuple(tensor.shape), rank, size) for name, tensor in tensors.items()}

    def state_loaded(self) -> None:
        """Nothing is derived from the state here."""


class ReplicatedFrozen:
    """A frozen model, whole on every rank."""

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        self._device, self._precision = world.device, recipe.precision
        blueprint.materialise(blueprint.decoder, world.device)
        self.model: nn.Module = blueprint.decoder.eval().requires_grad_(False)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad(), forward_precision(self._precision, self._device):
            yield

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor.detach()) for name, tensor in wanted(self.model, names))
