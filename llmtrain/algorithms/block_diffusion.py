"""Block diffusion language modelling: diffusion inside a block, autoregression from block to block.

    t ~ U[0, 1) for each block,  p = (1 - eps) t + eps,  each trained token of a block is masked with p
    L = sum over masked i of block b of  -log p(x_i | masked block b, clean blocks before it) / p

BD3-LM (arXiv 2503.09573, equation 8): L over the number of trained tokens is an upper bound of the negative
log-likelihood per token, in nats; exact with blocks of one token. All blocks of a row are computed in one
forward of 2T tokens, a noisy copy and then a clean one, under the mask of `attention.block_diffusion`; positions
run 0..T-1 in each copy. Blocks are cut from the start of each document (of each row, where a document goes on).
A document's last block is filled with end-of-text tokens: what is decoded is a whole block, and a text may end
anywhere in it. Of texts they do not count, so that L remains a bound per token of the text.

The rates of the global batch's blocks are spread evenly, in random order. They may be clipped to U[low, high]
(section 5): another training objective with less variance, and with `clip: search` the range is the one of
least variance of the blocks' losses on held-out text, which is part of the training state. Held-out figures are
of the bound itself, with exactly l of a block's n tokens masked.

With `shift` row i - 1 predicts token i, as in the autoregressive model that it may come from; the first token of
a block is then predicted by the clean copy's row before it, since the noisy block does not contain that place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.algorithms.masking import (
    BoolArray,
    Masking,
    Rows,
    bernoulli,
    exact_count,
    micro_batch,
    of_logits,
    per_document,
    rows_of,
    stratified,
    weighted_nll,
)
from llmtrain.contracts import LossOutput, MicroBatch
from llmtrain.data.counted_random import Float64Array, Int64Array
from llmtrain.data.hashing import derive_seed
from llmtrain.models.attention import Visible, block_diffusion, both, within
from llmtrain.recipe.schema import BlockDiffusion as Settings

Range = tuple[float, float]


class BlockDiffusion:
    """The noise and the loss.

    Args:
        settings: of the recipe.
        seed: of the noise.
        sequences: rows in the global batch.
        mask_id: the token that stands for a masked one.
        length: tokens in a row; a micro-batch may be cut to its longest.
        eos_id: ends a text, and fills up its last block.

    Attributes:
        clip: the rates that are trained on, where they are clipped.
        block_size: of the newest training step; it changes in a curriculum.
    """

    def __init__(self, settings: Settings, seed: int, sequences: int, mask_id: int, length: int, eos_id: int):
        self._settings, self._seed, self._sequences = settings, derive_seed(seed, "block_diffusion"), sequences
        self._mask_id, self._length, self._eos_id = mask_id, length, eos_id
        self.clip: Range | None = None if settings.clip in (None, "search") else _pair(settings.clip)
        self.block_size = settings.block_size_at(0)

    def noised(self, step: int, micro: MicroBatch) -> MicroBatch:
        """A training micro-batch of optimizer step `step`."""
        self.block_size = size = self._settings.block_size_at(step)
        rows = rows_of(micro, self._mask_id, shift=self._settings.shift)
        low, high = self.clip or (0.0, 1.0)
        rates = max(low, self._settings.eps), high  # a rate near 0 would give a token any weight
        masking = self._masked(rows, size, self._seed, self._sequences, rates)
        num_counted = self._num_counted(rows)
        if self._settings.normalization == "sequences":
            shares, num_documents = per_document(rows)
            masking, num_counted = masking._replace(weights=masking.weights * shares), float(num_documents)
        return self._batch(rows, masking, size, num_counted, micro.num_tokens)

    def held_out(self, micro: MicroBatch, num_rows: int) -> MicroBatch:
        """A held-out micro-batch, one of `num_rows` rows in all; always with the same noise."""
        size = self._settings.block_size
        rows = rows_of(micro, self._mask_id, shift=self._settings.shift)
        units = blocks_in_rows(rows, size)
        t = self._t_of_blocks(0, rows, num_rows, size, units)
        return self._batch(rows, exact_count(0, rows, units, t), size, self._num_counted(rows), micro.num_tokens)

    def _num_counted(self, rows: Rows) -> float:
        """Trained tokens; of texts without those that only fill up a last block.

        They are predicted like others, so that the sum stays a bound of the text with its end, over as many tokens as
        any other algorithm counts. (Of examples they count, as in LLaDA.)
        """
        if self._settings.task == "sft":
            return float(rows.trained.sum())
        is_eos = rows.input_ids == self._eos_id
        # One that begins a row is taken to fill up a text of the row before. It may be that text's own end: then a
        # token too few is counted, and the bound per token is a trifle above what it is.
        fills = is_eos.copy()
        fills[:, 1:] &= is_eos[:, :-1]
        return float((rows.trained & ~fills).sum())

    def at_random_rates(self, micro: MicroBatch, num_rows: int, draw: int) -> tuple[MicroBatch, "Blocks"]:
        """As `held_out` in blocks of `block_size`, with rates from eps to 1; `draw` numbers draws of noise."""
        size = self.block_size
        rows = rows_of(micro, self._mask_id, shift=self._settings.shift)
        masking = self._masked(rows, size, draw, num_rows, (self._settings.eps, 1.0))
        units = blocks_in_rows(rows, size)
        numbered = units + np.arange(len(units))[:, None] * (int(units.max()) + 1)
        _, first, numbers, sizes = np.unique(
            numbered[rows.trained], return_index=True, return_inverse=True, return_counts=True
        )
        blocks = Blocks(1.0 / masking.weights[rows.trained][first], sizes, numbers[masking.masked[rows.trained]])
        return self._batch(rows, masking, size, float(rows.trained.sum()), micro.num_tokens), blocks

    def masked(self, rows: Rows, masked: BoolArray) -> MicroBatch:
        """The rows with just these tokens, [B, T], masked, each of which counts 1."""
        masking, num = Masking(masked, np.ones(masked.shape)), float(masked.sum())
        return self._batch(rows, masking, self._settings.block_size, num, rows.input_ids.size)

    def _masked(self, rows: Rows, size: int, seed: int, sequences: int, rates: Range) -> Masking:
        if size == 1:
            # A token's loss does not depend on the rate, nor on other tokens' masks: all of them at once is exact.
            return Masking(rows.trained, np.ones(rows.trained.shape))
        units = blocks_in_rows(rows, size)
        low, high = rates
        t = self._t_of_blocks(seed, rows, sequences, size, units)
        return bernoulli(seed, rows, np.take_along_axis(low + (high - low) * t, units, axis=1))

    def _t_of_blocks(self, seed: int, rows: Rows, sequences: int, size: int, units: Int64Array) -> Float64Array:
        return stratified(seed, rows.positions, sequences, int(units.max()) + 1, -(-self._length // size))

    def _batch(self, rows: Rows, masking: Masking, size: int, num_counted: float, num_tokens: int) -> MicroBatch:
        num_rows, length = rows.input_ids.shape
        noisy = np.where(masking.masked, self._mask_id, rows.input_ids)
        places = np.arange(num_rows)[:, None] * 2 * length + np.arange(length)[None, :]
        if self._settings.shift:
            places = places - 1 + np.where(rows.position_ids % size == 0, length, 0)
        ids = np.concatenate([noisy, rows.input_ids], axis=1)
        batch = micro_batch(rows, ids, masking, places, num_counted, num_tokens)
        twice = {
            "position_ids": rows.position_ids,
            "document_ids": rows.document_ids,
            "blocks": rows.position_ids // size,
        }
        added = {name: torch.from_numpy(np.concatenate([array, array], axis=1)) for name, array in twice.items()}
        return MicroBatch({**batch.tensors, **added}, batch.weights, batch.num_tokens)

    def loss(self, model: nn.Module, micro: MicroBatch) -> LossOutput:
        return weighted_nll(model, micro, visible_to(micro), self._mask_id)

    def nats_of_tokens(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """-log p of each masked token, [N], in nats."""
        targets = micro.tensors["targets"]

        def nats(logits: Tensor, part: slice) -> Tensor:
            return F.cross_entropy(logits, targets[part], reduction="none")

        return of_logits(model, micro, visible_to(micro), self._mask_id, nats)


class Blocks(NamedTuple):
    """The blocks of a micro-batch in which a token is trained.

    Attributes:
        rates: float64 [U], at which each is masked.
        sizes: int64 [U], their trained tokens.
        of_masked: int64 [N], the block of each masked token.
    """

    rates: Float64Array
    sizes: Int64Array
    of_masked: Int64Array


def visible_to(micro: MicroBatch) -> Visible:
    """What each token of a micro-batch attends to."""
    return both(within(micro.tensors["document_ids"]), block_diffusion(micro.tensors["blocks"]))


def blocks_in_rows(rows: Rows, size: int) -> Int64Array:
    """[B, T]: the block of each token, counted from 0 in each row; blocks begin anew in each document."""
    begins = (rows.position_ids % size == 0) | (rows.position_ids == 0)
    begins[:, 0] = True
    numbers: Int64Array = np.cumsum(begins, axis=1) - 1
    return numbers


def _pair(clip: Sequence[float] | str | None) -> Range:
    assert clip is not None and not isinstance(clip, str)
    low, high = clip
    return low, high
