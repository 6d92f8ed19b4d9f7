"""Distillation: a student learns the next-token distributions of a teacher (GKD, arXiv 2306.13649).

    L = sum over trained tokens of  D(p_S( . | x_{<i}) , p_T( . | x_{<i}))

D is the generalised Jensen-Shannon divergence of `models/divergence.py`; the weight is the number of trained tokens,
of the data's answers or of answers that the student itself writes to the data's prompts (on-policy: what it is taught
is then about texts as it will write them, with its own mistakes in them). Both are sampled or read before the forward:
no gradient goes through the sampling.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain.algorithms.judged import Around
from llmtrain.algorithms.on_policy import OnPolicy
from llmtrain.algorithms.texts import HeldOut, Loss, bytes_of
from llmtrain.contracts import POLICY, FrozenModel, LossOutput, MicroBatch
from llmtrain.data.loader import Loader
from llmtrain.data.tokenizer import load_tokenizer, num_ids, pad_id
from llmtrain.errors import InputError
from llmtrain.models.checks import Asked, check_causality, check_document_isolation, check_head
from llmtrain.models.decoder import Decoder
from llmtrain.models.divergence import Predictions, linear_divergence
from llmtrain.models.loading import known_diffusion
from llmtrain.recipe import schema
from llmtrain.recipe.batch import BatchPlan
from llmtrain.recipe.schema import Recipe
from llmtrain.sampling.prompts import ends_of
from llmtrain.sampling.rollout import Writing, cache_obstacle, rollout, uncompiled

log = logging.getLogger(__name__)

_TEACHER = "algorithm.teacher"


class Taught:
    """The loss of a student against a teacher."""

    def __init__(self, settings: schema.Distillation, teacher: FrozenModel):
        self._settings, self._teacher = settings, teacher

    def loss(self, model: nn.Module, micro: MicroBatch) -> LossOutput:
        return LossOutput({POLICY: self.divergence(model, micro)})

    def divergence(self, student: nn.Module, micro: MicroBatch) -> Tensor:
        """Sum of D over a micro-batch's counted positions, in nats: a float32 scalar."""
        tensors, settings = micro.tensors, self._settings
        rows = tensors["input_ids"], tensors["position_ids"]
        with_gradients = torch.is_grad_enabled()
        found: list[Tensor] = []

        def counted(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1).index_select(0, tensors["counted"])

        def of_teacher(hidden: Tensor, head: nn.Linear) -> Tensor:
            theirs = Predictions(counted(hidden), head.weight, head.bias)

            def of_student(hidden: Tensor, head: nn.Linear) -> Tensor:
                ours = Predictions(counted(hidden), head.weight, head.bias)
                return linear_divergence(ours, theirs, settings.beta, settings.temperature)

            with torch.set_grad_enabled(with_gradients):
                found.append(student(*rows, of_student))
            # What sharding engines do with a module's output (hooks for its backward) is not for the student's loss.
            return theirs.hidden

        # The student's forward runs inside the teacher's: sharded heads are whole only within their own module's.
        with self._teacher.evaluating():
            self._teacher.model(*rows, of_teacher)
        return found[0]


class TaughtHeldOut:
    """Held-out figures: how far the student is from the teacher, and how well it predicts the text itself."""

    def __init__(self, taught: Taught, batches: Sequence[MicroBatch], num_bytes: float):
        self._divergence = HeldOut(batches, num_bytes, taught.divergence)
        self._text = HeldOut(batches, num_bytes)

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """The student's nll, perplexity and bits per byte; loss is the divergence, nats a token."""
        text = self._text.figures(model, device)
        if not text:
            return {}
        divergence = self._divergence.figures(model, device)["loss"]
        return {"loss": divergence, "nll": text["loss"]} | {key: text[key] for key in ("perplexity", "bits_per_byte")}


class Distilled(NamedTuple):
    """What `Supervised` is made of."""

    loss: Loss
    micro_batches: Callable[[int], list[MicroBatch]]
    held_out: TaughtHeldOut


def distilled(
    recipe: Recipe,
    batch: BatchPlan,
    loader: Loader,
    held_out: Sequence[MicroBatch],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: Any,
    around: Around,
) -> Distilled:
    """The recipe's distillation; all ranks call it.

    Args:
        loader: gives this rank's micro-batches of the data.
        held_out: this rank's micro-batches to measure on.
        chat_template: of the data, which may not be the tokenizer's own; None without one.
        around: with a teacher; its engine is the student's, whose `decoder` is as it was before it was wrapped.
    """
    settings, engine, decoder = recipe.algorithm, around.engine, around.decoder
    assert isinstance(settings, schema.Distillation)
    assert around.teacher is not None, "run.py opens it"
    taught = Taught(settings, around.teacher)
    num_bytes = bytes_of((micro.tensors["targets"] for micro in held_out), tokenizer)
    measured = TaughtHeldOut(taught, held_out, num_bytes)
    if settings.on_policy == 0:
        return Distilled(taught.loss, loader.micro_batches, measured)
    tokens = batch.micro_sequences * recipe.sequence_length
    with engine.evaluating(averaged=False), uncompiled(decoder):
        asked = Asked(engine.model, decoder, engine.device, exact=recipe.precision == "fp32")
        obstacle = cache_obstacle(asked, recipe.sequence_length)
    if obstacle is not None:
        log.warning(
            "the student writes its answers by whole forwards, which is slow: %s, so there is no cache", obstacle
        )
    writing = Writing(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.sampling_temperature,
        end_ids=frozenset(ends_of(decoder.hf, tokenizer, chat_template)),
        max_length=recipe.sequence_length,
        vocabulary=num_ids(tokenizer),
        batch_tokens=tokens,
        cached=obstacle is None,
    )

    def write(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        # Not an average of weights: on-policy is what the weights that are trained would write.
        with around.phases("compute"), engine.evaluating(averaged=False), uncompiled(decoder):
            return rollout(engine.model, prompts, seeds, writing, engine.device)

    on_policy = OnPolicy(
        settings.on_policy, recipe.seed, loader, write, recipe.sequence_length, tokens, pad_id(tokenizer), around.world
    )
    return Distilled(taught.loss, on_policy.micro_batches, measured)


def check_teacher(recipe: Recipe, teacher: FrozenModel, decoder: Decoder, device: torch.device, num_rows: int) -> None:
    """Asks the teacher as it will run; all ranks call it.

    Args:
        decoder: of the teacher, as it was before it was wrapped.
        num_rows: of a micro-batch.

    Raises:
        InputError: its logits are not its head on its hidden states, or it does not read rows as they are packed.
    """
    asked = Asked(teacher.model, decoder, device, exact=recipe.precision == "fp32")
    try:
        with teacher.evaluating():
            check_head(asked)
            check_causality(asked)
            if recipe.packing != "none":
                check_document_isolation(asked, num_rows)
    except InputError as error:
        where = _TEACHER if error.where == "model" else error.where
        raise InputError(f"the teacher: {error.message}", where=where, remedy=error.remedy) from error


def check_tokenizer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Called before the teacher is opened.

    Raises:
        InputError: the teacher's token ids mean other tokens than the student's, or it is no autoregressive model.
    """
    assert isinstance(recipe.algorithm, schema.Distillation)
    spec, where = recipe.algorithm.teacher, _TEACHER
    match spec:
        case schema.ModelFromConfig():
            return  # without a tokenizer of its own
        case schema.ModelFromGGUF():
            file = Path(spec.file).expanduser()
            if not os.path.isfile(file):  # unlike Path.is_file it raises nothing for a name that is too long
                raise InputError(f"no such file: {spec.file}", where=f"{where}.file", remedy="correct the path")
            theirs = load_tokenizer(str(file.parent), gguf_file=file.name)
        case schema.ModelFromPretrained():
            theirs = load_tokenizer(spec.path, spec.revision)
            if known_diffusion(str(Path(spec.path).expanduser()), f"{where}.path", spec.revision) is not None:
                raise InputError(
                    "the teacher is a diffusion model, which gives no distribution of the next token",
                    where=where,
                    remedy="name an autoregressive model",
                )
    difference = _difference(tokenizer.get_vocab(), theirs.get_vocab())
    if difference is not None:
        raise InputError(
            f"the teacher has another tokenizer than the student: {difference}",
            where=where,
            remedy="choose both from one family of models, without tokenizer.add_tokens; or train a student with the "
            "teacher's tokenizer (tokenizer: {kind: pretrained, path: ...})",
        )


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """One token that is not the same in both vocabularies; None where there is none."""
    if ours == theirs:
        return None
    for token in sorted(ours.keys() | theirs.keys(), key=lambda token: (ours.get(token, math.inf), token)):
        own, other = ours.get(token), theirs.get(token)
        if own != other:
            ids = [f"{'none' if number is None else number}" for number in (own, other)]
            return f"{token!r} has id {ids[0]} in the student's and {ids[1]} in the teacher's"
    return None
