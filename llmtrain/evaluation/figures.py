"""Figures and how far off they may be: the rows stand for all that could have been asked."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Figure(NamedTuple):
    """A figure, its standard error (None where there is none, as of a single row), and the rows that it is of.

    `note` is what else has to be known to compare it, such as that it is a bound.
    """

    value: float
    stderr: float | None
    rows: int
    note: str = ""


class Measured(NamedTuple):
    """What came of a task.

    Attributes:
        records: a row of the data each.
        details: what is no single figure, as JSON has it.
    """

    figures: dict[str, Figure]
    records: list[dict[str, Any]]
    details: dict[str, Any]


def mean(values: Sequence[float]) -> Figure:
    """The mean of rows; for zeros and ones the error is the binomial one, sqrt(p (1 - p) / (n - 1))."""
    rows = np.asarray(values, dtype=np.float64)
    error = None if len(rows) < 2 else float(rows.std(ddof=1)) / math.sqrt(len(rows))
    return Figure(float(rows.mean()), error, len(rows))


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Figure:
    """sum(sums) / sum(weights) of rows that weigh differently, such as nats over tokens of documents.

    The error is that of the linearised ratio (Cochran, Sampling Techniques, 6.4); the bootstrap over rows gives
    the same for many rows, and needs random numbers.
    """
    s, w = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if w.sum() == 0:
        return Figure(math.nan, None, len(s))
    value = float(s.sum() / w.sum())
    if len(s) < 2:
        return Figure(value, None, len(s))
    residuals = s - value * w
    error = math.sqrt(len(s) / (len(s) - 1) * float((residuals**2).sum())) / float(w.sum())
    return Figure(value, error, len(s))


def wilson(figure: Figure, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of rows, which holds near 0 and 1 as well, and for few rows."""
    share, n = figure.value, figure.rows
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def auc(positive: Sequence[float], negative: Sequence[float]) -> Figure:
    """The probability that a positive's score is above a negative's, ties half; its error is DeLong's (1988)."""
    p, n = np.sort(np.asarray(positive, dtype=np.float64)), np.sort(np.asarray(negative, dtype=np.float64))

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of each value the share of the others that lie below it."""
        return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))

    of_positives, of_negatives = below(p, n), 1 - below(n, p)
    error = None
    if min(len(p), len(n)) > 1:
        error = math.sqrt(of_positives.var(ddof=1) / len(p) + of_negatives.var(ddof=1) / len(n))
    return Figure(float(of_positives.mean()), error, len(p) + len(n))


def exponential(figure: Figure) -> Figure:
    """exp of a figure, with the error that follows to first order."""
    value = math.exp(min(figure.value, 700.0))  # it overflows beyond 709
    return Figure(value, None if figure.stderr is None else value * figure.stderr, figure.rows, figure.note)
