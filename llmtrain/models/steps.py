"""Answers in steps: how they are cut, and how what a process reward model says of each becomes one number."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

Aggregate = Literal["product", "min", "last"]

# Let's Verify Step by Step (arXiv 2305.20050): the product is the probability that all steps are right, section 2.6;
# the minimum is compared with it in appendix F.
AGGREGATES: dict[Aggregate, Callable[[Sequence[float]], float]] = {
    "product": math.prod,
    "min": min,
    "last": lambda probabilities: probabilities[-1],
}


def aggregate(probabilities: Sequence[float], how: Aggregate) -> float:
    """One number of the probabilities, at least one, that each step is right."""
    return AGGREGATES[how](probabilities)


def steps_of(text: str, separator: str) -> list[str]:
    """The pieces between separators that are not blank, in order, without the separators."""
    return [piece for piece in text.split(separator) if piece.strip()]
