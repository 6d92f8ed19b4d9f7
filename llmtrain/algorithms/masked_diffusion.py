"""Masked diffusion language modelling: pretraining and supervised fine-tuning as LLaDA does them.

    t ~ U[0, 1),  p = (1 - eps) t + eps,  each trained token of a document is masked with probability p
    L = sum over masked i of  -log p(x_i | x_masked) / p

LLaDA (arXiv 2502.09992, equation 3) and MDLM (arXiv 2406.07524): L over the number of trained tokens, masked
or not, is an upper bound of the negative log-likelihood per token, in nats. Attention is bidirectional within a
document, no token is shifted, and t is not told to the model. t is drawn for each document, and spread evenly
over the documents of the global batch. Held-out figures are of the same bound with exactly l of L tokens masked,
whose weights are bounded (`masking.exact_count`).

Variants, all unbiased or exactly what a paper says:
    shift          row i - 1 predicts token i, as in the autoregressive model that it may come from (Dream,
                   DiffuLLaMA, arXiv 2410.17891)
    annealing      causal attention, and each pair besides with a probability that rises to 1 (DiffuLLaMA)
    complementary  each document twice, masked and with what is not masked, weights 1/p and 1/(1-p), half each
    normalization  sequences: the mean over documents of (sum over the document / its trained tokens), as LLaDA's
                   SFT; tokens: one division by all trained tokens
In fine-tuning the prompt is never masked, since it is not trained.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from llmtrain.algorithms.masking import (
    BoolArray,
    Masking,
    Rows,
    bernoulli,
    cropped,
    documents_in,
    exact_count,
    micro_batch,
    of_documents,
    per_document,
    rows_of,
    stratified,
    weighted_nll,
)
from llmtrain.contracts import LossOutput, MicroBatch
from llmtrain.data.hashing import derive_seed
from llmtrain.data.packing import PADDING
from llmtrain.models.attention import Visible, bidirectional, both, causal, coin, either, within
from llmtrain.recipe.schema import MaskedDiffusion as Settings


class MaskedDiffusion:
    """The noise and the loss.

    Args:
        settings: of the recipe.
        seed: of the noise.
        sequences: rows in the global batch.
        mask_id: the token that stands for a masked one.
        pad_id: fills rows that are cut short.
    """

    def __init__(self, settings: Settings, seed: int, sequences: int, mask_id: int, pad_id: int):
        self._settings, self._seed, self._sequences = settings, derive_seed(seed, "masked_diffusion"), sequences
        self._mask_id, self._pad_id = mask_id, pad_id

    def noised(self, step: int, micro: MicroBatch) -> MicroBatch:
        """A training micro-batch of optimizer step `step`."""
        settings = self._settings
        rows = rows_of(micro, self._mask_id, shift=settings.shift)
        if settings.random_length_share:
            rows = cropped(self._seed, rows, settings.random_length_share, self._pad_id)
        shares, num_counted = np.ones(rows.input_ids.shape), int(rows.trained.sum())
        if settings.normalization == "sequences":
            shares, num_counted = per_document(rows)
        t = stratified(self._seed, rows.positions, self._sequences, documents_in(rows), units_a_row=1)
        last = 1.0 - settings.eps if settings.complementary else 1.0
        rates = of_documents(settings.eps + (last - settings.eps) * t, rows)
        drawn = bernoulli(self._seed, rows, rates)
        views = [Masking(drawn.masked, shares / rates)]
        if settings.complementary:
            rest = rows.trained & ~drawn.masked
            views = [Masking(drawn.masked, shares / rates / 2), Masking(rest, shares / (1.0 - rates) / 2)]
        return self._batch(rows, views, num_counted, settings.annealed(step))

    def held_out(self, micro: MicroBatch, num_rows: int) -> MicroBatch:
        """A held-out micro-batch, one of `num_rows` rows in all; always with the same noise."""
        rows = rows_of(micro, self._mask_id, shift=self._settings.shift)
        t = stratified(0, rows.positions, num_rows, documents_in(rows), units_a_row=1)
        masking = exact_count(0, rows, np.maximum(rows.document_ids, 0), t)
        return self._batch(rows, [masking], int(rows.trained.sum()), 1.0)

    def masked(self, rows: Rows, masked: BoolArray) -> MicroBatch:
        """The rows with just these tokens, [B, T], masked, each of which counts 1."""
        return self._batch(rows, [Masking(masked, np.ones(masked.shape))], int(masked.sum()), 1.0)

    def _batch(self, rows: Rows, views: Sequence[Masking], num_counted: int, ratio: float) -> MicroBatch:
        """One forward on all views of the rows."""
        num_tokens = int((rows.document_ids != PADDING).sum())
        rows = Rows(*(np.concatenate([array] * len(views)) for array in rows))
        masking = Masking(*(np.concatenate(arrays) for arrays in zip(*views, strict=True)))
        ids = np.where(masking.masked, self._mask_id, rows.input_ids)
        places = np.arange(ids.size).reshape(ids.shape) - (1 if self._settings.shift else 0)
        batch = micro_batch(rows, ids, masking, places, float(num_counted), num_tokens)
        added = {
            "position_ids": torch.from_numpy(rows.position_ids),
            "document_ids": torch.from_numpy(rows.document_ids),
        }
        if ratio < 1.0:  # coins are thrown for every pair of tokens, so none where all is seen
            added["ratio"] = torch.tensor(ratio)
        return MicroBatch({**batch.tensors, **added}, batch.weights, batch.num_tokens)

    def loss(self, model: nn.Module, micro: MicroBatch) -> LossOutput:
        return weighted_nll(model, micro, self.visible(micro), self._mask_id)

    def visible(self, micro: MicroBatch) -> Visible:
        """What each token attends to."""
        tensors = micro.tensors
        seen: Visible = bidirectional
        if "ratio" in tensors:
            seen = either(causal, coin(tensors["positions"], tensors["ratio"]))
        return both(within(tensors["document_ids"]), seen)
