"""Answers in steps, and one number for the probabilities of several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.models.steps import AGGREGATES, Aggregate, aggregate, one_step, steps_of


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
    assert steps_of("a\n\n\n b\n\nc\nd\n\n\n\n", "\n\n") == ["a", " b", "c\nd"]


@pytest.mark.parametrize(
    ("text", "separator", "step"),
    [
        (" a", "\n", " a"),
        ("a\n", "\n", "a"),
        ("\na\n\n", "\n", "a"),
        ("a\n", "\n\n", "a"),
        ("a\nb", "\n\n", "a\nb"),
        ("a\nb", "\n", None),
        ("a ки", " ки", "a"),
        (" ки", " ки", None),
        ("a-", "---", None),  # which is cut before its own end
        (" a", "aa", None),
    ],
)
def test_a_step_is_what_an_answer_of_it_is_cut_into(text: str, separator: str, step: str | None) -> None:
    assert one_step(text, separator) == step


@given(
    st.lists(st.text("ab-\n ", min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from(["\n", "\n\n", "\n \n", " ", "--", "aba", "\n-\n"]),
)
def test_joined_steps_are_cut_into_the_same_ones(texts: list[str], separator: str) -> None:
    steps = [step for text in texts if (step := one_step(text, separator)) is not None]
    assert steps_of(separator.join(steps), separator) == steps
    if len(steps) == len(texts):
        assert steps_of(separator.join(texts), separator) == steps
