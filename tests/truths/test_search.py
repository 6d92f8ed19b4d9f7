"""Search at inference: what is known of it without a model."""

import itertools
import math
import random

import numpy as np
import pytest

from llmtrain.search.beam import beam_search
from llmtrain.search.mcts import tree_search
from llmtrain.search.sampled import Samples, best_of_n, chance_of_best, vote, weighted_vote
from tests.unit.search.trees import TreeDriver

QUESTIONS = 4000


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_the_expected_maximum_of_n_uniform_numbers_is_n_over_n_plus_1(n: int) -> None:
    numbers = np.sort(np.random.default_rng(0).random((QUESTIONS, 16)))[:, ::-1]
    estimates = numbers @ chance_of_best(16, n)
    error = estimates.std() / math.sqrt(QUESTIONS)
    assert abs(estimates.mean() - n / (n + 1)) < 4 * error
    # All sets of n say more than one of them.
    one = numbers[:, :1] if n == 16 else np.random.default_rng(1).permuted(numbers, axis=1)[:, :n].max(1)
    assert estimates.std() <= one.std() + 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_best_of_n_by_a_perfect_judge_is_right_if_any_sample_is(n: int) -> None:
    """1 - (1 - p)^n, and by a judge that knows nothing p."""
    generator, p = np.random.default_rng(0), 0.2
    right = generator.random((QUESTIONS, 8)) < p
    votes = np.zeros(8, dtype=np.int64)
    perfect = [best_of_n(Samples(row, votes, scores=row.astype(float)), n).accuracy for row in right]
    assert np.mean(perfect) == pytest.approx(1 - (1 - p) ** n, abs=4 * np.std(perfect) / math.sqrt(QUESTIONS))
    blind = [best_of_n(Samples(row, votes, scores=generator.random(8)), n).accuracy for row in right]
    assert np.mean(blind) == pytest.approx(p, abs=4 * np.std(blind) / math.sqrt(QUESTIONS))


def majority(chances: list[float], n: int) -> float:
    """How often answer 0 wins the vote of n, by going through all that n samples can be."""
    total = 0.0
    for given in itertools.product(range(len(chances)), repeat=n):
        counts = [given.count(answer) for answer in range(len(chances))]
        first = next(answer for answer in given if counts[answer] == max(counts))
        total += (first == 0) * math.prod(chances[answer] for answer in given)
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("chances", [[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]])
def test_the_vote_of_a_known_distribution(chances: list[float], n: int) -> None:
    """It helps where the right answer is the likeliest one, and harms where it is not."""
    drawn = np.random.default_rng(0).choice(len(chances), p=chances, size=(QUESTIONS, 6))
    estimates = [vote(Samples(row == 0, row), n).accuracy for row in drawn]
    expected = majority(chances, n)
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / math.sqrt(QUESTIONS))
    if n >= 3:
        assert (expected > chances[0]) == (chances[0] == max(chances))


def test_weights_that_are_equal_are_a_vote_and_perfect_ones_a_perfect_judge() -> None:
    drawn = np.random.default_rng(0).choice(3, p=[0.3, 0.4, 0.3], size=(200, 8))
    for row in drawn:
        right = row == 0
        equal = Samples(right, row, weights=np.full(8, 0.7))
        assert weighted_vote(equal, 8) == vote(equal, 8)
        assert weighted_vote(Samples(right, row, weights=right.astype(float)), 8).accuracy == right.any()


def test_searches_that_may_see_everything_find_the_best_of_the_tree() -> None:
    for seed in range(10):
        chooser = random.Random(seed)
        values = {ids: chooser.random() for depth in (1, 2, 3) for ids in itertools.product(range(3), repeat=depth)}
        best = max(itertools.product(range(3), repeat=3), key=values.__getitem__)
        for search in (beam_search, tree_search):
            [found] = search(TreeDriver(3, 3, values.__getitem__), 3 * 27, 3)
            assert (found.path.ids, found.value) == (best, values[best])


def test_a_perfect_value_leads_every_search_straight_to_the_answer() -> None:
    """Of 4^6 answers one is right; the judge knows whether one can still become it."""
    right = (3, 1, 0, 2, 2, 1)

    def value(ids: tuple[int, ...]) -> float:
        return float(ids == right[: len(ids)])

    for search in (beam_search, tree_search):
        driver = TreeDriver(4, 6, value)
        [found] = search(driver, 4, 4)
        assert found.path.ids == right and driver.num_steps == 4 * 6
