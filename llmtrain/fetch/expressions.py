"""Whole-number expressions, worked out operation by operation; right, or with a wrong result carried through.

Only for what reasoning-gym wrote; its own solver evaluates the text as a program.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")


class Operation(NamedTuple):
    """One step: left operator right = result."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


class Worked(NamedTuple):
    """The operations in the order in which they are worked out, and what comes out."""

    operations: list[Operation]
    value: int


def work_out(text: str, wrong: Mapping[int, int] | None = None) -> Worked | None:
    """Works out + - * / and brackets.

    Args:
        wrong: results, by the number of their operation from 0, that are taken in place of the right ones.

    Returns:
        None where a division leaves a remainder, or is by zero.
    """
    reader = _Reader(text, wrong or {})
    try:
        return Worked(reader.operations, reader.value())
    except _Remainder:
        return None


def apply(left: int, operator: str, right: int) -> int | None:
    """The result of an operation; None of a division that is not exact."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return None if right == 0 or left % right else left // right


class _Reader:
    def __init__(self, text: str, wrong: Mapping[int, int]):
        self._tokens: list[str] = _TOKEN.findall(text)
        assert "".join(self._tokens) == "".join(text.split()), f"unknown characters in {text!r}"
        self._next, self._wrong = 0, wrong
        self.operations: list[Operation] = []

    def value(self) -> int:
        result = self._sum()
        assert self._next == len(self._tokens)
        return result

    def _take(self, *allowed: str) -> str | None:
        if self._next < len(self._tokens) and self._tokens[self._next] in allowed:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def _sum(self) -> int:
        left = self._product()
        while (operator := self._take("+", "-")) is not None:
            left = self._note(left, operator, self._product())
        return left

    def _product(self) -> int:
        left = self._unary()
        while (operator := self._take("*", "/")) is not None:
            left = self._note(left, operator, self._unary())
        return left

    def _unary(self) -> int:
        if self._take("-") is not None:
            return -self._unary()
        if self._take("(") is not None:
            inner = self._sum()
            assert self._take(")") is not None
            return inner
        self._next += 1
        return int(self._tokens[self._next - 1])

    def _note(self, left: int, operator: str, right: int) -> int:
        result = apply(left, operator, right)
        if result is None:
            raise _Remainder
        result = self._wrong.get(len(self.operations), result)
        self.operations.append(Operation(left, operator, right, result))
        return result


class _Remainder(Exception):
    """A division that is not exact."""
