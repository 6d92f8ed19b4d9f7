"""How likely texts are to a model of any kind, in nats: the same tokens for all, so that they compare.

Autoregressive models give -log p itself. Diffusion models give an upper bound, estimated by draws of noise, or
by replay the exact -log p of what a certain sampler writes (evaluation/likelihood.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from llmtrain.algorithms.masking import BoolArray, Rows
from llmtrain.data.counted_random import Float64Array, Int64Array
from llmtrain.data.hashing import derive_seed
from llmtrain.data.packing import PADDING
from llmtrain.errors import InputError
from llmtrain.evaluation.likelihood import (
    Draw,
    Estimate,
    Order,
    Predict,
    combined,
    masked_bound,
    of_decoder,
    replay,
    uniform_bound,
)
from llmtrain.evaluation.tasks import Likelihood, LoadedTask
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.saved import Saved
from llmtrain.sampling.samplers import BLOCK_LENGTH

_MAX_LOGITS = 1 << 26  # numbers in the logits of a batch, where they are whole: 256 MB in float32


class Span(NamedTuple):
    """A text, and which of its tokens are asked for.

    Attributes:
        ids: [T].
        counted: [T]; never the first. The others are read, and stay clean.
        key: tells its noise from others'; the same for texts that are to be compared under the same noise.
    """

    ids: Int64Array
    counted: BoolArray
    key: int


class Scorer(Protocol):
    """Gives nats of spans.

    Attributes:
        samples: draws of each span.
        exact: whether they are no estimates.
        note: what kind of number it is; empty for -log p itself.
        mask_id: a token that is never predicted, and so is not to be counted.
    """

    samples: int
    exact: bool
    note: str
    mask_id: int | None

    def most(self, batch_tokens: int) -> int:
        """Tokens of spans at most in a batch of about so many positions."""
        ...

    def nats(self, batch: Sequence[Span], draws: Int64Array) -> Float64Array:
        """Of each span by its draw of that number, [B]."""
        ...


class Autoregressive:
    """-log p(x_i | x_<i)."""

    samples, exact, note = 1, True, ""

    def __init__(self, saved: Saved):
        self._saved = saved
        self.mask_id: int | None = None

    def most(self, batch_tokens: int) -> int:
        vocabulary: int = self._saved.decoder.get_output_embeddings().weight.shape[0]
        return min(batch_tokens, _MAX_LOGITS // vocabulary)

    @torch.no_grad()
    def nats(self, batch: Sequence[Span], draws: Int64Array) -> Float64Array:
        width = max(len(span.ids) for span in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        counted = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, span in enumerate(batch):
            ids[row, : len(span.ids)] = torch.from_numpy(span.ids)
            counted[row, : len(span.ids)] = torch.from_numpy(span.counted)
        ids, counted = ids.to(self._saved.device), counted.to(self._saved.device)
        logits = self._saved.logits(ids)[:, :-1]
        # a row at a time: float32 logits of all of them would be a copy of the largest tensor there is
        rows = zip(logits, ids[:, 1:], counted[:, 1:], strict=True)
        nats = [F.cross_entropy(row[mask].float(), targets[mask], reduction="sum") for row, targets, mask in rows]
        return np.asarray([float(number) for number in nats])


class Bound:
    """The diffusion bound, by `samples` draws of noise a span."""

    def __init__(self, draw: Draw, diffusion: Diffusion, samples: int, seed: int):
        self._draw, self._seed = draw, derive_seed(seed, "likelihood")
        self._copies = 1 if diffusion.block_size is None else 2
        self.mask_id = diffusion.mask_token_id
        # Blocks of one token have no noise: each is masked whole, and all before it is clean.
        self.exact = diffusion.block_size == 1
        self.samples = 1 if self.exact else samples
        self.note = "exact" if self.exact else "upper bound"

    def most(self, batch_tokens: int) -> int:
        return batch_tokens // self._copies

    def nats(self, batch: Sequence[Span], draws: Int64Array) -> Float64Array:
        return self._draw(rows_of_spans(batch), draws, self.samples, self._seed)


class Replay:
    """-log p of a sampler that unmasks in this order."""

    samples, exact = 1, True

    def __init__(self, predict: Predict, diffusion: Diffusion, order: Order):
        self._predict, self._block_size, self._order = predict, diffusion.block_size, order
        self.mask_id = diffusion.mask_token_id
        self.note = f"exact, unmasked by {order.by}"

    def most(self, batch_tokens: int) -> int:
        return batch_tokens // (1 if self._block_size is None else 2)

    def nats(self, batch: Sequence[Span], draws: Int64Array) -> Float64Array:
        return replay(self._predict, rows_of_spans(batch), self._block_size, self._order)


def rows_of_spans(spans: Sequence[Span]) -> Rows:
    """One span a row, padded on the right; `positions` are the keys."""
    shape = len(spans), max(len(span.ids) for span in spans)
    place = np.broadcast_to(np.arange(shape[1]), shape)
    ids, trained = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, span in enumerate(spans):
        ids[row, : len(span.ids)] = span.ids
        trained[row, : len(span.ids)] = span.counted
    lengths = np.asarray([len(span.ids) for span in spans])[:, None]
    documents = np.where(place < lengths, 0, PADDING)
    return Rows(ids, place.copy(), documents, trained, np.asarray([span.key for span in spans]))


def scorer_for(loaded: LoadedTask, task: Likelihood, saved: Saved) -> Scorer:
    """What gives the model's likelihoods as the task asks for them.

    Raises:
        InputError: the task asks for what a model of this kind does not have.
    """
    diffusion = saved.diffusion
    if diffusion is None:
        return Autoregressive(saved)
    decoder = Decoder(saved.decoder)
    if task.method == "replay":
        order = _order(loaded, task, diffusion)
        return Replay(of_decoder(decoder, diffusion, saved.device), diffusion, order)
    if diffusion.process == "uniform":
        vocabulary = saved.decoder.get_output_embeddings().weight.shape[0]
        draw = uniform_bound(decoder, diffusion, vocabulary, saved.device)
    else:
        draw = masked_bound(of_decoder(decoder, diffusion, saved.device), diffusion.block_size)
    return Bound(draw, diffusion, task.samples, task.seed)


def _order(loaded: LoadedTask, task: Likelihood, diffusion: Diffusion) -> Order:
    if diffusion.process == "uniform":
        raise InputError(
            "this model's noise makes tokens other tokens, so nothing is unmasked",
            where=loaded.where("method"),
            remedy="use method: bound",
        )
    if diffusion.block_size is not None and task.block_length not in (None, diffusion.block_size):
        raise InputError(
            f"{task.block_length}, and the model's own blocks have {diffusion.block_size} tokens",
            where=loaded.where("block_length"),
            remedy="leave block_length out",
        )
    length = (task.block_length or BLOCK_LENGTH) if diffusion.block_size is None else None
    return Order(task.order, task.tokens_per_step, task.steps, task.threshold, length)


def score(scorer: Scorer, spans: Sequence[Span], batch_tokens: int, advance: Callable[[int], None]) -> Float64Array:
    """Nats of each span by each of the scorer's draws, [S, samples].

    Args:
        batch_tokens: about so many positions are computed at once.
        advance: is told how many draws were done.
    """
    order = sorted(range(len(spans)), key=lambda index: -len(spans[index].ids))
    todo = [(index, draw) for index in order for draw in range(scorer.samples)]
    drawn = np.zeros((len(spans), scorer.samples))
    most, done = scorer.most(batch_tokens), 0
    while done < len(todo):
        part = todo[done : done + max(1, most // len(spans[todo[done][0]].ids))]
        indices, draws = (np.asarray(numbers) for numbers in zip(*part, strict=True))
        drawn[indices, draws] = scorer.nats([spans[index] for index in indices], draws)
        done += len(part)
        advance(len(part))
    return drawn


def estimated(scorer: Scorer, drawn: Float64Array) -> Estimate:
    """The estimates, [S], of draws [S, samples], and their variances: 0 where nothing is estimated."""
    return Estimate(drawn[:, 0], np.zeros(len(drawn))) if scorer.exact else combined(drawn)
