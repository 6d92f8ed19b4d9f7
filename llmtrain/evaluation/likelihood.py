"""How likely a text is to a diffusion language model: a bound, estimated without bias, and exact replay of a policy.

The bound (LLaDA, arXiv 2502.09992, equation 6; the integral over rates that training draws from is the same number):

    -log p(x) <= L E_l E_masked [ 1/l sum over masked i of -log p(x_i | x without the masked) ],   l ~ U{1..L}

with exactly l of the L counted tokens masked, so that weights are at most L. In block diffusion it is the sum of
the blocks' bounds, each with an l of its own and the clean blocks before it; with blocks of one token it is exact.
Draws of a text are stratified: l = 1 + floor(L t), with t uniform in its stratum, and two draws in each, which tell
how far off they are. (Evenly spaced t with one random start would not tell; rounding evenly spaced numbers to l, as
some do, prefers even l where halves are rounded to even, and is biased.)

Replay (DUEL, arXiv 2603.01367): a sampler that chooses the next places by a pure function of the logits, and draws
their tokens from p, gives a text with exactly the probability

    log p(x) = sum over its steps of log p(x_i | what is unmasked by then) at the places chosen

which sums to 1 over all texts. Each text has one path, on which the places are chosen as the sampler would.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.algorithms.block_diffusion import BlockDiffusion, blocks_in_rows, visible_to
from llmtrain.algorithms.masked_diffusion import MaskedDiffusion
from llmtrain.algorithms.masking import BoolArray, Rows, exact_count, of_logits
from llmtrain.algorithms.score_entropy import ScoreEntropy
from llmtrain.contracts import MicroBatch
from llmtrain.data.counted_random import Float64Array, Int64Array, uniforms
from llmtrain.models.diffusion import Diffusion
from llmtrain.recipe import schema
from llmtrain.sampling.samplers import Unmasking
from llmtrain.sampling.unmasking import Policy, at_random, by_confidence, by_threshold, top_probability
from llmtrain.sampling.writing import policy_of


class Predicted(NamedTuple):
    """What a model says of masked tokens, in the order of rows and places; on the CPU.

    Attributes:
        logprobs: [N], of the tokens that are there.
        confidence: [N], the probability of the likeliest token at each place.
    """

    logprobs: Tensor
    confidence: Tensor


class Predict(Protocol):
    """A model that is asked for masked tokens."""

    def __call__(self, rows: Rows, masked: BoolArray, asked: BoolArray | None = None) -> Predicted:
        """What it says of rows [B, T] of which the tokens `masked` [B, T] are hidden; of those `asked`, else of all."""
        ...


Draw = Callable[[Rows, Int64Array, int, int], Float64Array]
"""Of (rows, the draw's number [B] for each row, number of draws, seed): an estimate of each row's nats, [B]."""


@dataclass(frozen=True)
class Order:
    """In which order a sampler unmasks, as `llmtrain generate` does: a pure function of the logits.

    Attributes:
        by: confidence: first the places whose likeliest token has the most probability. place: from the left.
        tokens_per_step: at most so many in a step; each stage's are spread evenly.
        steps: in place of that: for the whole text. With neither, one token a step.
        threshold: in place of both: all of at least this confidence, and at least one.
        block_length: stages of so many places, one after another; of block diffusion they are its own blocks.
    """

    by: Literal["confidence", "place"] = "confidence"
    tokens_per_step: int | None = None
    steps: int | None = None
    threshold: float | None = None
    block_length: int | None = None

    def policy(self, is_open: Tensor, in_all: Tensor) -> Policy:
        """Of a stage whose open places are bool [B, L], of `in_all` [B] ones of the whole text."""
        places = torch.arange(is_open.shape[1], dtype=torch.float64).expand(is_open.shape) / is_open.shape[1]
        if self.tokens_per_step is not None:
            steps = -(-is_open.sum(1) // self.tokens_per_step)
            return by_confidence(is_open, steps) if self.by == "confidence" else at_random(is_open, steps, places)
        if self.threshold is not None:
            return by_threshold(self.threshold)
        remasking: Literal["low-confidence", "random"] = "low-confidence" if self.by == "confidence" else "random"
        return policy_of(Unmasking("llada", self.steps, remasking=remasking), is_open, in_all, places)


# ------------------------------------------------------------------------------------ models


def of_decoder(decoder: nn.Module, diffusion: Diffusion, device: torch.device | str = "cpu") -> Predict:
    """A `models.decoder.Decoder`, or what is called as one, trained by masked or block diffusion.

    All blocks of a row are computed in one forward, of a noisy and a clean copy.
    """
    mask_id, shift, process = diffusion.mask_token_id, diffusion.shift, _process(diffusion)
    assert mask_id is not None

    @torch.no_grad()
    def predict(rows: Rows, masked: BoolArray, asked: BoolArray | None = None) -> Predicted:
        assert not (shift and (masked & (rows.position_ids == 0)).any()), "a first token has no place before it"
        micro = process.masked(rows, masked)
        if asked is not None:
            among = torch.from_numpy(asked[masked])
            fewer = {name: micro.tensors[name][among] for name in ("heads", "targets", "row_weights")}
            micro = MicroBatch({**micro.tensors, **fewer}, micro.weights, micro.num_tokens)
        micro = micro.to(torch.device(device))
        visible = visible_to(micro) if isinstance(process, BlockDiffusion) else process.visible(micro)
        targets = micro.tensors["targets"]
        said = of_logits(decoder, micro, visible, mask_id, lambda logits, part: _said(logits, targets[part]))
        return Predicted(*said.cpu().unbind(1))

    return predict


def _process(diffusion: Diffusion) -> MaskedDiffusion | BlockDiffusion:
    """What lays out its forward; its own noise is not used."""
    mask_id = diffusion.mask_token_id
    assert mask_id is not None
    if diffusion.block_size is None:
        masked = schema.MaskedDiffusion(kind="masked_diffusion", shift=diffusion.shift)
        return MaskedDiffusion(masked, seed=0, sequences=1, mask_id=mask_id, pad_id=mask_id)
    block = schema.BlockDiffusion(kind="block_diffusion", shift=diffusion.shift, block_size=diffusion.block_size)
    return BlockDiffusion(block, seed=0, sequences=1, mask_id=mask_id, length=1, eos_id=-1)


def _said(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, 2] of logits [N, V]: log-probabilities of the targets, and the sampler's confidence."""
    logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
    return torch.stack([logprobs, top_probability(logits)], 1)


# ------------------------------------------------------------------------------------- the bound


def units_of(rows: Rows, block_size: int | None) -> Int64Array:
    """[B, T]: what has an l of its own, from 0 in each row: blocks, or without them documents."""
    return np.maximum(rows.document_ids, 0) if block_size is None else blocks_in_rows(rows, block_size)


def strata(samples: int) -> Int64Array:
    """The stratum of each draw, [samples]: two draws in each, so that they tell how far off they are."""
    return np.arange(samples) % max(1, samples // 2)


def levels(seed: int, keys: Int64Array, draws: Int64Array, samples: int, num_units: int) -> Float64Array:
    """t in [0, 1), [B, num_units], of draw number `draws` [B] of each of the rows `keys` [B].

    Uniform in the draw's stratum, and so uniform over the draws; a pure function of its arguments.
    """
    which = strata(samples)
    drawn = uniforms(seed, "level", keys[:, None], draws[:, None], np.arange(num_units)[None, :])
    t: Float64Array = (which[draws][:, None] + drawn) / (int(which.max()) + 1)
    return t


def masked_bound(predict: Predict, block_size: int | None) -> Draw:
    """One draw of the bound with exactly l of each unit's tokens masked."""

    def draw(rows: Rows, draws: Int64Array, samples: int, seed: int) -> Float64Array:
        units = units_of(rows, block_size)
        t = levels(seed, rows.positions, draws, samples, int(units.max(initial=0)) + 1)
        masking = exact_count(seed, rows._replace(positions=rows.positions * samples + draws), units, t)
        nats = -predict(rows, masking.masked).logprobs.double().numpy()
        return _of_rows(masking.weights[masking.masked] * nats, masking.masked)

    return draw


def uniform_bound(decoder: nn.Module, diffusion: Diffusion, vocabulary: int, device: torch.device | str) -> Draw:
    """One draw of the bound of a model whose noise makes tokens any other tokens (algorithms/score_entropy.py).

    As the held-out figures of a run it holds what is left at both ends of the rates (`ScoreEntropy.at_ends`).
    """
    settings = schema.ScoreEntropy(kind="score_entropy", noise="uniform", shift=diffusion.shift)
    process = ScoreEntropy(settings, 0, 1, None, vocabulary)

    @torch.no_grad()
    def draw(rows: Rows, draws: Int64Array, samples: int, seed: int) -> Float64Array:
        t = levels(seed, rows.positions, draws, samples, int(rows.document_ids.max(initial=0)) + 1)
        noisy = rows._replace(positions=rows.positions * samples + draws)
        nats = process.of_tokens(decoder, process.at(noisy, t, seed).to(torch.device(device)))
        nats = nats + process.at_ends(decoder, process.least(noisy, seed).to(torch.device(device)))
        return _of_rows(nats.double().cpu().numpy(), rows.trained)

    return draw


def _of_rows(values: Float64Array, where: BoolArray) -> Float64Array:
    """Sums by row, [B], of the values of the places that `where` [B, T] marks."""
    sums: Float64Array = np.bincount(np.nonzero(where)[0], weights=values, minlength=len(where)).astype(np.float64)
    return sums


class Estimate(NamedTuple):
    """Of rows: nats [B], and the variances that the draws give them, NaN of a single draw."""

    nats: Float64Array
    variances: Float64Array


def combined(draws: Float64Array) -> Estimate:
    """The mean over draws [B, samples], a stratum counting as much as another.

    The variance is unbiased: strata have draws of their own, two or three of them.
    """
    which = strata(draws.shape[1])
    parts = [draws[:, which == stratum] for stratum in range(int(which.max()) + 1)]
    nats = np.mean([part.mean(1) for part in parts], axis=0)
    if draws.shape[1] == 1:
        return Estimate(nats, np.full(len(draws), np.nan))
    variances = np.sum([part.var(1, ddof=1) / part.shape[1] for part in parts], axis=0) / len(parts) ** 2
    return Estimate(nats, variances)


def bound(draw: Draw, rows: Rows, samples: int, seed: int = 0) -> Estimate:
    """The bound of -log p of the counted tokens of rows [B, T], whose `positions` tell their noise apart."""
    numbers = np.arange(samples)
    return combined(np.stack([draw(rows, np.full(len(rows.positions), n), samples, seed) for n in numbers], axis=1))


# --------------------------------------------------------------------------------- exact replay


def replay(predict: Predict, rows: Rows, block_size: int | None, order: Order) -> Float64Array:
    """-log p, [B], of the counted tokens of rows [B, T] to a sampler that unmasks in this order.

    Args:
        block_size: of block diffusion; its blocks are replayed all at once, each with the true ones before it.
    """
    where = np.flatnonzero(rows.trained)
    lanes = _lanes(rows, units_of(rows, block_size), where)
    is_open, num_stages, stages = lanes.filled(order.block_length)
    nats = torch.zeros(is_open.shape, dtype=torch.float64)
    for stage in range(num_stages):
        in_stage = is_open & (stages == stage)
        policy, turn = order.policy(in_stage, lanes.in_text), 0
        while (todo := is_open & in_stage).any():
            asked = policy.asked(turn, todo)
            said = predict(rows, lanes.in_rows(is_open, where, rows), lanes.in_rows(asked, where, rows))
            confidence = torch.zeros(is_open.shape, dtype=said.confidence.dtype)
            confidence[asked] = said.confidence
            chosen = policy.chosen(turn, asked, confidence)
            nats[chosen] = -said.logprobs.double()[chosen[asked]]
            is_open = is_open & ~chosen
            turn += 1
    return _of_rows(nats[lanes.lane, lanes.offset].numpy(), rows.trained)


class _Lanes(NamedTuple):
    """What is unmasked independently of each other, texts or their blocks, side by side: R lanes of M tokens.

    Attributes:
        lane, offset: int64 [N], where each counted token went.
        place: int64 [N], in its row, from the first one of its lane.
        in_text: int64 [R], counted tokens of a lane's whole text.
    """

    lane: Int64Array
    offset: Int64Array
    place: Int64Array
    in_text: Tensor

    def filled(self, block_length: int | None) -> tuple[Tensor, int, Tensor]:
        """Which cells hold a token, bool [R, M]; the number of stages; the stage of each, [R, M]."""
        shape = len(self.in_text), int(self.offset.max(initial=-1)) + 1
        is_open, stages = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
        is_open[self.lane, self.offset] = True
        if block_length is not None:
            stages[self.lane, self.offset] = torch.from_numpy(self.place // block_length)
        return is_open, int(stages.max()) + 1 if len(self.lane) else 0, stages

    def in_rows(self, cells: Tensor, where: Int64Array, rows: Rows) -> BoolArray:
        """Cells [R, M] as places [B, T]; `where` [N] are those of the counted tokens."""
        places = np.zeros(rows.trained.size, np.bool_)
        places[where] = cells[self.lane, self.offset].numpy()
        return places.reshape(rows.trained.shape)


def _lanes(rows: Rows, units: Int64Array, where: Int64Array) -> _Lanes:
    row, place = np.divmod(where, units.shape[1])
    numbers = row * (int(units.max(initial=0)) + 1) + units.ravel()[where]
    _, first, lane, sizes = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    offset = np.arange(len(where)) - (np.cumsum(sizes) - sizes)[lane]
    text = row * (int(rows.document_ids.max(initial=0)) + 1) + np.maximum(rows.document_ids.ravel()[where], 0)
    in_text = np.bincount(text)[text[first]]
    return _Lanes(lane, offset, place - place[first][lane], torch.from_numpy(in_text))
