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
    """The pieces between separators that are not blank, in order, without the separators.

    Around a separator of spaces and line breaks these do not count: of "\\n\\n" three line breaks end a step, too.
    """
    edges = separator if separator.isspace() else ""
    return [piece.strip(edges) for piece in text.split(separator) if piece.strip()]


def one_step(text: str, separator: str) -> str | None:
    """The step that `steps_of` finds where this one stands in an answer; None where it finds several, or ends it early.

    So answers that are joined of such steps are cut into the same ones again.
    """
    found = steps_of(text + separator, separator)
    rest = (text + separator).split(separator)[-1]
    return found[0] if len(found) == 1 and not rest.strip() else None
