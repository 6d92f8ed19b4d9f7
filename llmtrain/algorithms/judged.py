"""Algorithms that learn from answers that were judged, put together from a recipe."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain import distributed
from llmtrain.algorithms import dpo, kto, orpo, process_reward, reward_model, simpo
from llmtrain.algorithms.answers import Reference as ReferenceLogprobs
from llmtrain.algorithms.answers import cached_reference, reference_without
from llmtrain.algorithms.held_out_sums import HeldOutSums
from llmtrain.algorithms.reference import Half, Reference, with_reference
from llmtrain.algorithms.texts import Loss, Measured, Supervised, TextSamples
from llmtrain.contracts import Algorithm, Engine, FrozenModel, MicroBatch, Phase
from llmtrain.data.build import Datasets, cache_directory
from llmtrain.data.group_batches import GroupCollator, StepCollator
from llmtrain.data.group_rows import GroupRows, MismatchedRows
from llmtrain.data.loader import Collator, Loader, evaluation_batches
from llmtrain.data.packing import Rows
from llmtrain.data.prepared import group_layout
from llmtrain.data.tokenizer import pad_id
from llmtrain.distributed import World
from llmtrain.models.decoder import Decoder
from llmtrain.models.identity import weights_identity
from llmtrain.recipe import schema
from llmtrain.recipe.batch import BatchPlan
from llmtrain.recipe.schema import Recipe

AdapterOff = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Around:
    """What stands around an algorithm.

    Attributes:
        engine: of the policy.
        adapter_off: switches the policy's adapter off while its context is open; None without one.
        teacher: of distillation.
        directory: of the run.
        phases: names what goes on, for a watchdog.
    """

    engine: Engine
    decoder: Decoder
    world: World
    directory: Path
    phases: Phase
    adapter_off: AdapterOff | None = None
    teacher: FrozenModel | None = None


def judged(
    recipe: Recipe, batch: BatchPlan, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, around: Around
) -> Algorithm:
    """The algorithm of a recipe whose data are answers that were judged."""
    return _Build(recipe, batch, tokenizer, datasets, around).algorithm()


@dataclass(frozen=True)
class _Build:
    recipe: Recipe
    batch: BatchPlan
    tokenizer: PreTrainedTokenizerBase
    datasets: Datasets
    around: Around

    def algorithm(self) -> Algorithm:
        settings = self.recipe.algorithm
        measured: Measured
        match settings:
            case schema.ProcessReward():
                measured = process_reward.HeldOutSteps(self._held_out())
                return self._supervised(process_reward.loss, self._loader().micro_batches, measured)
            case schema.RewardModel():
                measured = reward_model.HeldOutScores(settings, self._held_out())
                return self._supervised(reward_model.loss(settings), self._loader().micro_batches, measured)
            case schema.ORPO():
                return self._plain(orpo.loss(settings))
            case schema.SimPO():
                return self._plain(simpo.loss(settings))
            case schema.DPO():
                return self._dpo(settings)
            case schema.KTO():
                return self._kto(settings)
        raise TypeError(f"{settings.kind} judges no answers")

    def _plain(self, loss: Loss) -> Algorithm:
        return self._supervised(loss, self._loader().micro_batches, HeldOutSums(self._held_out(), loss))

    def _dpo(self, settings: schema.DPO) -> Algorithm:
        loader, reference = self._loader(), self._reference(settings.reference)
        loss = dpo.loss(settings, reference)
        kept = self._kept(settings.reference, mismatched=False)

        def micro_batches(step: int) -> list[MicroBatch]:
            return kept.of("train", loader.micro_batches(step))

        held_out = kept.of("validation", self._held_out())
        return self._supervised(loss, micro_batches, HeldOutSums(held_out, loss))

    def _kto(self, settings: schema.KTO) -> Algorithm:
        loader, reference = self._loader(), self._reference(settings.reference)
        mismatched = self._loader(MismatchedRows)
        loss = kto.loss(settings, reference)
        kept = self._kept(settings.reference, mismatched=True)

        def micro_batches(step: int) -> list[MicroBatch]:
            others = kept.of("train-mismatched", mismatched.micro_batches(step))
            engine = self.around.engine
            with self.around.phases("compute"), engine.evaluating(averaged=False):
                kl = _kl(engine.model, others, reference, engine.device)
            return [with_kl(micro, kl) for micro in kept.of("train", loader.micro_batches(step))]

        own = kept.of("validation", self._held_out())
        others = kept.of("validation-mismatched", self._held_out(MismatchedRows))
        return self._supervised(loss, micro_batches, _HeldOutKTO(own, others, loss, reference))

    def _reference(self, kind: str) -> ReferenceLogprobs:
        if kind == "cached":
            return cached_reference
        off = self.around.adapter_off
        assert off is not None, "the schema asks for an adapter"
        return reference_without(off)

    def _kept(self, kind: str, *, mismatched: bool) -> "_Kept":
        if kind != "cached":
            return _Kept(None)
        around, micro = self.around, self.batch.micro_sequences
        reference = Reference(
            around.engine,
            around.world,
            around.phases,
            self._collator(),
            around.directory,
            self.datasets.fingerprint,
            lambda: weights_identity(self.recipe, cache_directory(self.recipe.data.cache_dir)),
            self.recipe.adapter is not None,
            micro,
        )
        halves = [
            Half(name, _groups(rows), mismatched)
            for name, rows in (("train", self.datasets.train), ("validation", self.datasets.validation))
        ]
        return _Kept(reference.logprobs(halves))

    def _collator(self) -> Collator:
        pad, length = pad_id(self.tokenizer), self.recipe.sequence_length
        if isinstance(self.recipe.algorithm, schema.ProcessReward):
            return StepCollator(length, pad)
        return GroupCollator(group_layout(self.recipe), length, pad)

    def _loader(self, seen: Callable[[GroupRows], Rows] | None = None) -> Loader:
        batch, world = self.batch, self.around.world
        rows = _seen(self.datasets.train, seen)
        order = self.datasets.order(self.recipe.seed)
        return Loader(rows, order, batch.sequences, batch.micro_sequences, world.rank, world.size, self._collator())

    def _held_out(self, seen: Callable[[GroupRows], Rows] | None = None) -> list[MicroBatch]:
        rows, world = _seen(self.datasets.validation, seen), self.around.world
        most = self.recipe.evaluation.max_sequences
        return evaluation_batches(rows, most, self.batch.micro_sequences, world.rank, world.size, self._collator())

    def _supervised(
        self, loss: Loss, micro_batches: Callable[[int], list[MicroBatch]], measured: Measured
    ) -> Algorithm:
        recipe, datasets = self.recipe, self.datasets
        max_length = self.around.decoder.max_length(default=recipe.sequence_length)
        prompt_ids = datasets.documents.prompt_ids
        samples = TextSamples(recipe.samples, self.tokenizer, max_length, recipe.seed, prompt_ids)
        return Supervised(loss, micro_batches, measured, samples, datasets.fingerprint)


def _groups(rows: Sequence[Rows]) -> list[GroupRows]:
    groups = [source for source in rows if isinstance(source, GroupRows)]
    assert len(groups) == len(rows), "documents that were judged make rows of groups"
    return groups


def _seen(rows: Sequence[Rows], seen: Callable[[GroupRows], Rows] | None) -> Sequence[Rows]:
    return rows if seen is None else [seen(source) for source in _groups(rows)]


@dataclass(frozen=True)
class _Kept:
    """Log-probabilities under the reference; None where they are computed in each step."""

    logprobs: Mapping[str, Tensor] | None

    def of(self, half: str, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        if self.logprobs is None:
            return list(micros)
        return [with_reference(micro, self.logprobs[half]) for micro in micros]


def _kl(model: nn.Module, others: Sequence[MicroBatch], reference: ReferenceLogprobs, device: torch.device) -> float:
    """Of all ranks' mismatched answers; see `kto`."""
    mine, num_mine = kto.divergence(model, [micro.to(device) for micro in others], reference)
    total, num = distributed.sum_scalars([float(mine), num_mine])
    return max(0.0, total / num) if num else 0.0


def with_kl(micro: MicroBatch, kl: float) -> MicroBatch:
    """The micro-batch with what its step's answers to other prompts say of the distance from the reference."""
    return MicroBatch({**micro.tensors, "kl": torch.tensor(kl)}, micro.weights, micro.num_tokens)


class _HeldOutKTO:
    """Held-out figures of KTO, whose kl is that of the held-out mismatched answers."""

    def __init__(
        self, own: Sequence[MicroBatch], others: Sequence[MicroBatch], loss: Loss, reference: ReferenceLogprobs
    ):
        self._own, self._others, self._loss, self._reference = own, others, loss, reference

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        kl = _kl(model, self._others, self._reference, device)
        return HeldOutSums([with_kl(micro, kl) for micro in self._own], self._loss).figures(model, device)
