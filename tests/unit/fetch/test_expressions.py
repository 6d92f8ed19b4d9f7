"""Expressions, worked out right and wrong."""

import pytest

from llmtrain.fetch.expressions import work_out


@pytest.mark.parametrize(
    ("text", "value", "steps"),
    [
        ("2 - -1", 3, ["2 - -1 = 3"]),
        ("-( -( ( -59 + 21 ) - 40 ) ) + -96", -174, ["-59 + 21 = -38", "-38 - 40 = -78", "-78 + -96 = -174"]),
        ("2 + 3 * 4 / 6", 4, ["3 * 4 = 12", "12 / 6 = 2", "2 + 2 = 4"]),
        ("7", 7, []),
    ],
)
def test_expressions(text: str, value: int, steps: list[str]) -> None:
    worked = work_out(text)
    assert worked is not None
    assert worked.value == value
    assert [str(operation) for operation in worked.operations] == steps


@pytest.mark.parametrize("text", ["7 / 2", "7 / ( 3 - 3 )"])
def test_divisions_that_are_not_exact(text: str) -> None:
    assert work_out(text) is None


def test_a_wrong_result_is_carried_through() -> None:
    worked = work_out("2 + 3 * 4 / 6", {0: 18})
    assert worked is not None and worked.value == 5
    assert [str(operation) for operation in worked.operations] == ["3 * 4 = 18", "18 / 6 = 3", "2 + 3 = 5"]
    assert work_out("2 + 3 * 4 / 6", {0: 13}) is None
