"""Held-out figures of any loss: its sum and its metrics over held-out micro-batches, each divided once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmtrain import distributed
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, MicroBatch, Sum

BINS = 10  # of predicted probabilities, in the expected calibration error


class HeldOutSums:
    """A `Measured` of a loss and its metrics.

    Args:
        batches: this rank's share, as many as every other rank's.
        loss: gives the same metrics for every micro-batch.
    """

    def __init__(self, batches: Sequence[MicroBatch], loss: Loss):
        self._batches, self._loss = batches, loss

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """loss and the loss's metrics, equal on all ranks; nothing where no rows are held out."""
        sums: dict[str, Sum] = {}
        for micro in self._batches:
            output = self._loss(model, micro.to(device))
            parts = {"loss": Sum(output.sums[POLICY].detach(), micro.weights[POLICY]), **output.metrics}
            for name, (value, weight) in parts.items():
                before = sums.get(name, Sum(0.0, 0.0))
                sums[name] = Sum(before.value + value, before.weight + weight)
        return distributed.average(sums) if sums else {}


def calibration_sums(predicted: Tensor, observed: Tensor, weights: Tensor, low: float = 0.0) -> Tensor:
    """Of each bin of predicted probability, the weighted sum of (predicted - observed): float64 [BINS].

    The sum of their absolute values, added up over micro-batches and ranks before, over the sum of the weights is
    the expected calibration error (arXiv 1706.04599, section 2).

    Args:
        predicted: [N] probabilities from `low` to 1, which equal bins cut up.
        observed: [N] what happened, from 0 to 1.
        weights: [N].
    """
    bins = ((predicted - low) / (1 - low) * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64, device=predicted.device)
    return sums.index_add(0, bins, (weights * (predicted - observed)).double())
