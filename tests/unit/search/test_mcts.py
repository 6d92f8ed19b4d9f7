"""Monte Carlo tree search on small trees."""

import itertools
import random

import pytest

from llmtrain.search.mcts import tree_search
from tests.unit.search.trees import TreeDriver


def random_values(fan_out: int, depth: int, seed: int = 0) -> dict[tuple[int, ...], float]:
    chooser = random.Random(seed)
    levels = range(1, depth + 1)
    return {ids: chooser.random() for level in levels for ids in itertools.product(range(fan_out), repeat=level)}


def test_a_round_is_one_call_for_all_questions() -> None:
    driver = TreeDriver(4, 3, lambda ids: 0.5, questions=5)
    found = tree_search(driver, budget=4, width=4)
    assert [one.path.question for one in found] == [0, 1, 2, 3, 4]
    assert [len(call) for call in driver.calls] == [5 * 4] * 3


@pytest.mark.parametrize("budget", [1, 3, 4, 9, 32])
def test_a_search_costs_as_many_steps_as_its_budget_of_answers_at_most(budget: int) -> None:
    driver = TreeDriver(1000, 5, lambda ids: random.Random(str(ids)).random())
    assert tree_search(driver, budget, width=4)[0].path.is_whole
    assert driver.num_steps <= budget * 5
    drawn = [(branch.sample, branch.depth) for call in driver.calls for branch in call]
    assert len(set(drawn)) == len(drawn)  # a random number is used once


def test_a_budget_of_one_is_one_sample() -> None:
    driver = TreeDriver(7, 4, lambda ids: 0.5)
    tree_search(driver, budget=1, width=4)
    assert [len(call) for call in driver.calls] == [1, 1, 1, 1]


def test_with_simulations_for_all_of_them_it_finds_the_best_leaf() -> None:
    for seed in range(5):
        values = random_values(3, 3, seed)
        found = tree_search(TreeDriver(3, 3, values.__getitem__), budget=3 * 27, width=3)[0]
        leaves = {ids: value for ids, value in values.items() if len(ids) == 3}
        assert (found.path.ids, found.value) == max(leaves.items(), key=lambda leaf: leaf[1])


def test_a_tree_that_is_known_whole_ends_the_search() -> None:
    driver = TreeDriver(2, 2, lambda ids: 0.5)
    tree_search(driver, budget=1000, width=2)
    assert driver.num_steps == 2 + 2 * 2


def test_values_lead_it() -> None:
    """The good leaf lies below the path of good values, one of 256."""
    path = (2, 0, 3, 1)

    def value(ids: tuple[int, ...]) -> float:
        return 1.0 if ids == path[: len(ids)] else 0.1

    found = tree_search(TreeDriver(4, 4, value), budget=4, width=4)[0]
    assert found.path.ids == path


def test_it_turns_away_from_a_path_that_disappoints() -> None:
    """Way 0 looks best, and all of its answers are bad."""

    def value(ids: tuple[int, ...]) -> float:
        if ids[0] == 0:
            return 0.9 if len(ids) == 1 else 0.0
        return 0.5

    found = tree_search(TreeDriver(2, 3, value), budget=8, width=2)[0]
    assert found.value == 0.5 and found.path.ids[0] == 1


def test_the_likelier_of_equal_steps_comes_first() -> None:
    driver = TreeDriver(2, 2, lambda ids: 0.5, prior=lambda ids: 0.9 if ids[-1] == 1 else 0.1)
    tree_search(driver, budget=2, width=2)
    assert driver.calls[1][0].path.ids == (1,)
