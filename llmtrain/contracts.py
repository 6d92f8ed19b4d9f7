"""The contract between the loop, the algorithms and the engines.

    for batch in algorithm.step_batches(step):      one batch an optimizer step
        total = sum of the micro-batches' weights over all ranks
        for micro in batch:
            engine.backward(algorithm.loss(models, micro).sums / total)
        engine.step(lr)

An algorithm returns loss SUMS over a micro-batch; the loop divides once by the total weight of the
global batch. That makes the gradient independent of how the batch was split over ranks and
micro-batches. An algorithm knows no backend, an engine knows no algorithm, the loop knows neither
a model nor a loss. Trainable models are keyed by name ("policy", later "critic"), and so are their
engines, loss sums and weights.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

POLICY = "policy"  # the name of the only trainable model, where there is one

Phase = Callable[[str], AbstractContextManager[None]]
"""Names what goes on inside its context: for the watchdog, which knows how long each may take."""


class Sum(NamedTuple):
    """A metric before its one division: reduced over ranks and micro-batches, then value / weight."""

    value: Tensor | float
    weight: float


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward works on.

    Attributes:
        tensors: whatever the algorithm's loss reads, on the CPU until the loop moves it.
        weights: for each trainable model, how many units (tokens, sequences, pairs) count in its
            loss; known before the forward, and zero for a micro-batch that only fills up a rank.
        num_tokens: tokens of text in it, padding not counted; for throughput.
    """

    tensors: Mapping[str, Tensor]
    weights: Mapping[str, float]
    num_tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return MicroBatch(moved, self.weights, self.num_tokens)


@dataclass(frozen=True)
class LossOutput:
    """The result of one micro-batch.

    Attributes:
        sums: for each trainable model, the scalar loss summed (never averaged) over what counts.
        metrics: figures beside the loss, each a sum with its weight.
    """

    sums: Mapping[str, Tensor]
    metrics: Mapping[str, Sum] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A text the model was asked for while training, to look at."""

    prompt: str
    completion: str


class Algorithm(Protocol):
    """A source of batches and a loss; one file each in `llmtrain/algorithms`."""

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of one optimizer step after another, starting at `first_step` >= 0.

        What step s yields must be a pure function of (seed, s, models), so that a resumed run sees
        what the uninterrupted one would have seen. All ranks yield equally many micro-batches.
        """
        ...

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        """Loss sums over one micro-batch; `models` are the engines' modules."""
        ...

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        """Held-out figures, equal on all ranks; called in evaluation mode without gradients."""
        ...

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        """Texts to look at; called on all ranks, in evaluation mode without gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What beside (seed, step) the batches depend on; JSON values only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What an engine's optimizer step did.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping.
        applied: False where the norm was not finite, so that no weight was changed.
    """

    grad_norm: float
    applied: bool


class Shard(NamedTuple):
    """A rank's part of one tensor of the training state: a run of its elements, in row-major order.

    Every backend cuts tensors into such runs: FSDP by rows, ZeRO anywhere, DDP not at all. So this
    is all that a checkpoint needs to know to be read back on another layout.

    Attributes:
        local: the elements, contiguous and of any shape; live, so that writing here changes the state.
        start: index of its first element in the flattened whole.
        shape: of the whole tensor.
        replica: which one this rank is of the `replicas` ranks that hold this same run.
        replicas: how many they are; each of them saves a part of it.
    """

    local: Tensor
    start: int
    shape: tuple[int, ...]
    replica: int = 0
    replicas: int = 1


class Engine(Protocol):
    """One trainable model on one backend; all ranks call every method in the same order."""

    model: nn.Module
    device: torch.device

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Wraps a micro-batch's forward and backward; gradients are reduced in the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, summed (not averaged) over the ranks."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clips, steps the optimizer at learning rate `lr` and zeroes the gradients."""
        ...

    def evaluating(self, averaged: bool = True) -> AbstractContextManager[None]:
        """Evaluation mode without gradients, with the averaged weights where EMA is on.

        With `averaged` false it is the weights that are trained: for answers and figures that a step is made of.
        """
        ...

    def full_parameters(self, names: Collection[str] | None = None) -> Iterable[tuple[str, Tensor]]:
        """Streams (name, whole tensor) of the weights to export, in the same order on all ranks.

        Of these `names` only, where they are given: nothing else is gathered. At most one whole tensor
        lives at a time beside the engine's own memory: whoever wants more copies it out before asking
        for the next.
        """
        ...

    def state(self) -> dict[str, Shard]:
        """This rank's shards of the training state, under names that no backend colours.

        `model.<parameter>` and `model.<buffer>` (what is trained, and persistent buffers),
        `optimizer.<parameter>.{exp_avg,exp_avg_sq,step}`, `ema.<parameter>`, `ema_updates`. Complete
        from the first step on and before it; a checkpoint is loaded by writing into it.
        """
        ...

    def state_loaded(self) -> None:
        """Called when a checkpoint was written into `state()`: brings in line what is derived from it."""
        ...

    def describe(self) -> str:
        """One line of what really runs: backend, ranks, shards and replicas, precision."""
        ...


class FrozenModel(Protocol):
    """A model that is only asked: reference, reward model, teacher; sharded as its backend shards."""

    model: nn.Module

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients, in the recipe's precision."""
        ...

    def full_parameters(self, names: Collection[str] | None = None) -> Iterable[tuple[str, Tensor]]:
        """As `Engine.full_parameters`."""
        ...


def mark_last(batch: list[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Yields each micro-batch with whether it is the last of its optimizer step."""
    for index, micro in enumerate(batch):
        yield micro, index == len(batch) - 1
