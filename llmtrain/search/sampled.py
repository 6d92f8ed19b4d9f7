"""Methods that choose among whole answers, sampled apart from each other: best-of-n, the vote, the weighted vote.

A smaller budget is measured on the same samples as a larger one, and each figure is unbiased:

    best-of-n        the mean over all sets of n of the N samples, in closed form: of the samples from the best to the
                     worst, number i is the best of C(N - i, n - 1) of the C(N, n) sets
    votes            the mean over the N // n blocks of n samples that follow each other

Of equal scores the earlier sample is chosen, of equal votes the answer that was given first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmtrain.algorithms.masking import BoolArray
from llmtrain.data.counted_random import Float64Array, Int64Array


@dataclass(frozen=True)
class Samples:
    """N whole answers to a question.

    Attributes:
        correct: [N].
        votes: [N], a number for what each gives as its answer, the same where that is the same; -1 without one.
        scores: [N], the judge's; None where there is none.
        weights: [N], its scores as weights of votes, from 0 to 1: probabilities that a process model gives, sigmoids
            of an outcome model's scores.
    """

    correct: BoolArray
    votes: Int64Array
    scores: Float64Array | None = None
    weights: Float64Array | None = None


class Choice(NamedTuple):
    """The expected accuracy of n samples, and which of the first n is chosen; None where no answer was given."""

    accuracy: float
    chosen: int | None


def best_of_n(samples: Samples, n: int) -> Choice:
    """The sample of the highest score."""
    assert samples.scores is not None
    order = np.argsort(-samples.scores, kind="stable")
    accuracy = float(chance_of_best(len(order), n) @ samples.correct[order])
    return Choice(accuracy, int(np.argmax(samples.scores[:n])))


def chance_of_best(num: int, n: int) -> Float64Array:
    """[num]: the share of the sets of n of `num` things in which the best, the second best, ... of all is the best.

    With values from the best to the worst, its product with them is the unbiased estimate of the expected maximum of n.
    """
    sets = math.comb(num, n)
    return np.asarray([math.comb(num - 1 - place, n - 1) / sets for place in range(num)])


def vote(samples: Samples, n: int) -> Choice:
    """The answer that most samples give (self-consistency, arXiv 2203.11171)."""
    return _voted(samples, np.ones(len(samples.votes)), n)


def weighted_vote(samples: Samples, n: int) -> Choice:
    """The answer whose samples have the largest sum of weights."""
    assert samples.weights is not None
    return _voted(samples, samples.weights, n)


def _voted(samples: Samples, weights: Float64Array, n: int) -> Choice:
    blocks = [range(first, first + n) for first in range(0, len(weights) - n + 1, n)]
    chosen = [_winner(samples.votes, weights, block) for block in blocks]
    right = [index is not None and bool(samples.correct[index]) for index in chosen]
    return Choice(sum(right) / len(right), chosen[0])


def _winner(votes: Int64Array, weights: Float64Array, block: Sequence[int]) -> int | None:
    """The first sample of the block that gives the answer with the most votes."""
    sums: dict[int, float] = {}
    first: dict[int, int] = {}
    for index in block:
        answer = int(votes[index])
        if answer >= 0:
            first.setdefault(answer, index)
            sums[answer] = sums.get(answer, 0.0) + float(weights[index])
    # max takes the first of equal ones, and a dict keeps the order in which answers came.
    return first[max(sums, key=lambda answer: sums[answer])] if sums else None


def numbered(answers: Sequence[str | None], same: Callable[[str], Callable[[str], bool]]) -> Int64Array:
    """[N]: answers that are the same by a task's comparison have the same number; -1 for none.

    Args:
        same: of an answer, what says whether another is the same.
    """
    known: list[tuple[int, Callable[[str], bool]]] = []
    numbers: dict[str, int] = {}
    for answer in answers:
        if answer is not None and answer not in numbers:
            number = next((number for number, equals in known if equals(answer)), len(known))
            if number == len(known):
                known.append((number, same(answer)))
            numbers[answer] = number
    return np.asarray([-1 if answer is None else numbers[answer] for answer in answers], dtype=np.int64)
