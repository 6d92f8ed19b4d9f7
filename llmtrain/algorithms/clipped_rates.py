"""Which rates of masking block diffusion trains on: the range whose block losses vary least.

BD3-LM (arXiv 2503.09573, section 5): the variance of the gradient falls with that of the blocks' losses, so of
the ranges U[low, high] the one is taken for which held-out blocks' losses have the least variance. Only training
uses it; what is reported is always of all rates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from llmtrain import distributed
from llmtrain.algorithms.block_diffusion import BlockDiffusion, Range
from llmtrain.algorithms.texts import Measured
from llmtrain.contracts import MicroBatch
from llmtrain.data.counted_random import Float64Array

WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the ranges that are tried, beside the full one
STRIDE = 0.05
DRAWS = 4  # of noise on each held-out row: each block of a draw is at one rate only
LEAST_BLOCKS = 32  # in a range, for its variance to mean something


class SearchedRates:
    """Held-out figures, and after each of them the best range of rates; the state of the search.

    Args:
        process: whose `clip` is set.
        held_out: the figures to give.
        batches: this rank's share of the held-out rows, before noise.
        num_rows: of all ranks.
    """

    def __init__(self, process: BlockDiffusion, held_out: Measured, batches: Sequence[MicroBatch], num_rows: int):
        self._process, self._held_out, self._num_rows = process, held_out, num_rows
        self._batches = batches

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        figures = self._held_out.figures(model, device)
        if figures:
            rates, losses = self._block_losses(model, device)
            self._process.clip = least_variance(rates, losses)
            low, high = self._process.clip
            figures |= {"clip_low": low, "clip_high": high}
        return figures

    def _block_losses(self, model: nn.Module, device: torch.device) -> tuple[Float64Array, Float64Array]:
        """Rate of each of this rank's held-out blocks, and its loss at it, in nats a token."""
        rates, losses = [np.empty(0)], [np.empty(0)]
        for micro in self._batches:
            for draw in range(DRAWS):
                batch, blocks = self._process.at_random_rates(micro, self._num_rows, draw)
                nats = self._process.nats_of_tokens(model, batch.to(device)).double().cpu().numpy()
                weighted = np.bincount(blocks.of_masked, nats, minlength=len(blocks.rates))
                rates.append(blocks.rates)
                losses.append(weighted / blocks.rates / blocks.sizes)
        return np.concatenate(rates), np.concatenate(losses)

    def state_dict(self) -> dict[str, Any]:
        return {"clip": self._process.clip}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        clip = state["clip"]
        self._process.clip = None if clip is None else (clip[0], clip[1])


def candidates() -> list[Range]:
    """The full range first, then those of each width, from low to high."""
    ranges: list[Range] = [(0.0, 1.0)]
    for width in WIDTHS:
        num = round((1 - width) / STRIDE) + 1
        ranges += [(round(place * STRIDE, 2), round(place * STRIDE + width, 2)) for place in range(num)]
    return ranges


def least_variance(rates: Float64Array, losses: Float64Array) -> Range:
    """The range in which the losses [N] of blocks at `rates` [N] vary least, over the blocks of all ranks."""
    moments = []
    for low, high in candidates():
        inside = losses[(rates >= low) & (rates <= high)]
        moments += [float(len(inside)), float(inside.sum()), float((inside**2).sum())]
    summed = np.asarray(distributed.sum_scalars(moments)).reshape(-1, 3)
    num = np.maximum(summed[:, 0], 1)
    variances = summed[:, 2] / num - (summed[:, 1] / num) ** 2
    variances[1:][summed[1:, 0] < LEAST_BLOCKS] = np.inf
    return candidates()[int(np.argmin(variances))]
