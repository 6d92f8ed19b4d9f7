"""Worked answers with a slip."""

import random

import pytest

from llmtrain.fetch.expressions import Worked, apply, work_out
from llmtrain.fetch.slips import Slip, slip


def slips(expression: str, num: int = 200) -> tuple[Worked, list[Slip]]:
    right = work_out(expression)
    assert right is not None
    found = [slip(expression, random.Random(seed)) for seed in range(num)]
    return right, [one for one in found if one is not None]


@pytest.mark.parametrize("expression", ["3 + 9 + 2", "12 - 40 * 3 + -7", "( 8 / 2 ) * 31 - 5"])
def test_one_operation_is_wrong_and_the_rest_goes_on_from_it(expression: str) -> None:
    right, found = slips(expression)
    for wrong in found:
        first = wrong.operation
        assert wrong.worked.value != right.value
        assert wrong.worked.operations[:first] == right.operations[:first]
        for number, operation in enumerate(wrong.worked.operations):
            is_right = apply(operation.left, operation.operator, operation.right) == operation.result
            assert is_right == (number != first)
    assert {wrong.operation for wrong in found} == set(range(len(right.operations)))
    assert {wrong.kind for wrong in found} == {"off by one", "wrong operation", "swapped digits"}


def test_what_each_kind_does() -> None:
    _, found = slips("50 - 79")
    assert {(wrong.kind, wrong.worked.value) for wrong in found} == {
        ("off by one", -28),
        ("off by one", -30),
        ("wrong operation", 129),
        ("swapped digits", -92),
    }


def test_a_slip_that_changes_nothing_is_none() -> None:
    _, found = slips("( 3 + 4 ) * 0")
    assert found and all(wrong.operation == 1 for wrong in found), "7 * 0 and 8 * 0 are the same"
    assert slip("7", random.Random(0)) is None
