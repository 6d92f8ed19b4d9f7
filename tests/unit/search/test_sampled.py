"""Best-of-n and votes."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from llmtrain.evaluation.answers import equals
from llmtrain.search.sampled import Choice, Samples, best_of_n, chance_of_best, numbered, vote, weighted_vote


def samples(correct: list[bool], votes: list[int], scores: list[float] | None = None) -> Samples:
    numbers = None if scores is None else np.asarray(scores)
    return Samples(np.asarray(correct), np.asarray(votes), numbers, numbers)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_sets(n: int) -> None:
    generator = np.random.default_rng(n)
    for _ in range(10):
        scores = generator.integers(0, 4, 6).astype(float)  # with ties
        correct = generator.random(6) < 0.5
        best = [max(chosen, key=lambda i: (scores[i], -i)) for chosen in itertools.combinations(range(6), n)]
        given = best_of_n(samples(list(correct), [0] * 6, list(scores)), n)
        assert given.accuracy == pytest.approx(np.mean(correct[best]))
        assert given.chosen == max(range(n), key=lambda i: (scores[i], -i))


def test_chances_sum_to_one() -> None:
    for n in range(1, 65):
        assert chance_of_best(64, n).sum() == pytest.approx(1)
    assert chance_of_best(4, 4).tolist() == [1, 0, 0, 0]


def test_votes() -> None:
    given = samples([True, False, False, True, False], [0, 1, 1, 0, -1])
    assert vote(given, 1) == Choice(2 / 5, 0)  # the fifth gives no answer
    assert vote(given, 2) == Choice(0.5, 0)  # (0, 1) is a tie, which the first wins; (1, 0) likewise
    assert vote(given, 3) == Choice(0.0, 1)  # 1 has two of three; the rest is no block of three
    assert vote(given, 5) == Choice(1.0, 0)  # two each


def test_what_gives_no_answer_does_not_vote() -> None:
    assert vote(samples([False, False, True], [-1, -1, 0]), 3) == Choice(1.0, 2)
    assert vote(samples([False, False], [-1, -1]), 2) == Choice(0.0, None)


def test_weights() -> None:
    given = samples([True, False, False], [0, 1, 1], [0.9, 0.4, 0.4])
    assert weighted_vote(given, 3) == Choice(1.0, 0)
    assert vote(given, 3) == Choice(0.0, 1)
    assert weighted_vote(samples([False, True], [0, 1], [0.0, 0.0]), 2) == Choice(0.0, 0)


def test_equal_weights_are_a_vote() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        votes = generator.integers(-1, 4, 16)
        given = Samples(votes == 2, votes, weights=np.full(16, 0.25))
        for n in (1, 2, 3, 8, 16):
            assert weighted_vote(given, n) == vote(given, n)


def test_answers_are_numbered_as_the_task_compares_them() -> None:
    given = ["7", None, "7.0", "eight", "7", "Eight"]

    def same(answer: str) -> Callable[[str], bool]:
        return equals([answer], ["strip", "lower", "numeric"])

    assert numbered(given, same).tolist() == [0, -1, 0, 1, 0, 1]
