"""Whether probabilities are what they say: of all that is called 70 % sure, 70 % should be right (arXiv 1706.04599)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Predictions whose probability lies in [low, high), of the last bin in [low, 1].

    Attributes:
        count: how many.
        weight: the sum of their weights.
        confidence: their mean probability.
        accuracy: the share of them that came true.
    """

    low: float
    high: float
    count: int
    weight: float
    confidence: float
    accuracy: float


def reliability(
    probabilities: Sequence[float],
    outcomes: Sequence[float],
    weights: Sequence[float] | None = None,
    least: float = 0.0,
) -> list[Bin]:
    """Predictions in ten bins of equal width from `least` to 1; bins that are empty are left out.

    Args:
        probabilities: in [least, 1].
        outcomes: 1 where it came true, 0 where not, 0.5 where it cannot be told.
        weights: of the predictions; default: all count the same.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    w = np.ones_like(p) if weights is None else np.asarray(weights, dtype=np.float64)
    edges = np.linspace(least, 1, NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, p, "right") - 1, 0, NUM_BINS - 1)
    bins = []
    for index in range(NUM_BINS):
        inside = places == index
        weight = float(w[inside].sum())
        if weight:
            confidence, accuracy = (float((w * of)[inside].sum()) / weight for of in (p, y))
            count, low, high = int(inside.sum()), float(edges[index]), float(edges[index + 1])
            bins.append(Bin(low, high, count, weight, confidence, accuracy))
    return bins


def expected_error(bins: Sequence[Bin]) -> float:
    """ECE: how far the confidence of a bin and its accuracy are apart, the mean over predictions."""
    apart = sum(found.weight * abs(found.confidence - found.accuracy) for found in bins)
    return apart / sum(found.weight for found in bins)
