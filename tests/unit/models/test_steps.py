"""Answers in steps, and one number for the probabilities of several."""

import pytest

from llmtrain.models.steps import AGGREGATES, Aggregate, aggregate, steps_of


@pytest.mark.parametrize(("how", "expected"), [("product", 0.125), ("min", 0.25), ("last", 0.5)])
def test_one_number(how: Aggregate, expected: float) -> None:
    assert aggregate([1.0, 0.25, 0.5], how) == expected
    assert aggregate([0.75], how) == 0.75


def test_certain_steps_are_a_certain_answer() -> None:
    assert all(aggregate([1.0, 1.0], how) == 1.0 for how in AGGREGATES)


def test_blank_pieces_are_no_steps() -> None:
    assert steps_of("a\n\n  \n b \nc\n", "\n") == ["a", " b ", "c"]
    assert steps_of("a ки b", " ки") == ["a", " b"]
    assert steps_of("a", "\n") == ["a"]
    assert steps_of(" \n", "\n") == []
