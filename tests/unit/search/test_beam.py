"""Step beam search on small trees."""

import itertools
import random

import pytest

from llmtrain.search.beam import beam_search
from llmtrain.search.paths import Branch, Path, distinct
from tests.unit.search.trees import TreeDriver


def test_a_level_is_one_call_for_all_questions_and_costs_the_budget() -> None:
    driver = TreeDriver(100, 3, lambda ids: 1 / (1 + sum(ids)), questions=5)
    found = beam_search(driver, budget=8, width=4)
    assert [one.path.question for one in found] == [0, 1, 2, 3, 4]
    assert [len(call) for call in driver.calls] == [5 * 8] * 3
    for call in driver.calls:  # a random number is used once
        assert len({(branch.path.question, branch.sample, branch.depth) for branch in call}) == len(call)


@pytest.mark.parametrize(("budget", "width", "steps"), [(1, 4, 1), (3, 4, 3), (8, 4, 8), (9, 4, 8), (6, 1, 6)])
def test_the_steps_of_a_level(budget: int, width: int, steps: int) -> None:
    driver = TreeDriver(100, 2, lambda ids: -float(sum(ids)))
    beam_search(driver, budget, width)
    assert [len(call) for call in driver.calls] == [steps, steps]


def test_the_same_tokens_are_one_path() -> None:
    """With one way to go on, one path is kept, and not the same one twice."""
    driver = TreeDriver(1, 3, lambda ids: 0.5)
    beam_search(driver, budget=8, width=4)
    assert [len(call) for call in driver.calls] == [8, 4, 4]


def test_of_equal_paths_the_first_stays_in_its_place() -> None:
    first, second, again = Path(0, (1,), "a"), Path(0, (2,), "b"), Path(0, (1,), "c")
    assert distinct([first, second, again]) == [first, second]


def test_it_keeps_the_best() -> None:
    """Greedy by value: the first step is the best of its level, whatever follows."""
    value = {(0,): 0.9, (1,): 0.5, (0, 0): 0.1, (0, 1): 0.2, (1, 0): 1.0, (1, 1): 1.0}
    narrow = beam_search(TreeDriver(2, 2, value.__getitem__), budget=2, width=2)[0]
    assert (narrow.path.ids, narrow.value) == ((0, 1), 0.2)
    wide = beam_search(TreeDriver(2, 2, value.__getitem__), budget=4, width=2)[0]
    assert (wide.path.ids, wide.value) == ((1, 0), 1.0)


class Ragged(TreeDriver):
    """A path that takes way 0 is whole at once."""

    def extend(self, branches: list[Branch]) -> list[Path]:  # type: ignore[override]
        paths = super().extend(branches)
        return [Path(p.question, p.ids, p.text, "stop" if p.ids[-1] == 0 else p.finish) for p in paths]


def test_a_whole_answer_that_was_driven_out_still_counts() -> None:
    value = {(0,): 0.6, (1,): 0.9, (1, 0): 0.1, (1, 1): 0.3}
    found = beam_search(Ragged(2, 2, value.__getitem__), budget=2, width=2)[0]
    assert (found.path.ids, found.value) == ((0,), 0.6)


def test_whole_answers_are_not_gone_on_from() -> None:
    driver = Ragged(3, 4, lambda ids: 1.0 / len(ids))
    found = beam_search(driver, budget=6, width=3)[0]
    assert found.path.is_whole and found.path.ids == (0,)


def test_wide_enough_it_is_exhaustive() -> None:
    chooser = random.Random(0)
    values = {ids: chooser.random() for depth in (1, 2, 3) for ids in itertools.product(range(3), repeat=depth)}
    found = beam_search(TreeDriver(3, 3, values.__getitem__), budget=81, width=3)[0]
    leaves = {ids: value for ids, value in values.items() if len(ids) == 3}
    assert found.path.ids == max(leaves, key=lambda ids: leaves[ids])
