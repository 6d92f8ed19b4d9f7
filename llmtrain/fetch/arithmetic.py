"""Arithmetic with worked answers in a fixed format: rows of reasoning-gym as conversations, and the task to score them.

Training and held-out rows have no question in common, and no question comes twice.
"""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.errors import InputError

log = logging.getLogger(__name__)

INSTRUCTION = "Work it out step by step, then end with the result as <answer>result</answer>."
_TRIES_A_ROW = 50  # questions that are drawn for one that is new, before they count as exhausted
_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")


@dataclass(frozen=True)
class Source:
    """A data set of reasoning-gym, and how its rows are worked out.

    Attributes:
        dataset: reasoning-gym's name of it.
        worked: the steps to a row's answer; None where the row is no good.
        settings: of the data set: its difficulty.
    """

    dataset: str
    worked: Callable[[dict[str, Any]], str | None]
    settings: dict[str, Any] = field(default_factory=dict)


def _steps(row: dict[str, Any]) -> str | None:
    """One operation a line, in the order in which they are worked out."""
    steps: list[str] = []
    result = _Expression(row["metadata"]["expression"], steps).value()
    return "\n".join(steps) if str(result) == row["answer"] else None


def _given_steps(row: dict[str, Any]) -> str | None:
    """The worked solution that comes with the row."""
    text, _, answer = row["metadata"]["answer_cot"].rpartition("####")
    return text.strip() if text.strip() and answer.strip() == row["answer"] else None


SOURCES = {
    "chain-sum": Source("chain_sum", _steps, dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1)),
    "basic-arithmetic": Source("basic_arithmetic", _steps, dict(min_terms=2, max_terms=4, min_digits=1, max_digits=2)),
    "gsm-symbolic": Source("gsm_symbolic", _given_steps),
}


def write(source: Source, directory: Path, rows: int, test_rows: int, seed: int) -> str:
    """Writes train.jsonl, test.jsonl and task.yaml; returns a line that says so.

    Raises:
        InputError: reasoning-gym is not installed, or has fewer different questions.
    """
    conversations = _conversations(source, rows + test_rows, seed)
    # Small problems come often and are exhausted first: only a shuffle makes the two parts alike.
    random.Random(seed).shuffle(conversations)  # noqa: S311 - no secret
    parts = {"test.jsonl": conversations[:test_rows], "train.jsonl": conversations[test_rows:]}
    for name, part in parts.items():
        text = "".join(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in part)
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "task.yaml").write_text(TASK, encoding="utf-8")
    return (
        f"train.jsonl ({rows} rows), test.jsonl ({test_rows} rows, none of them in train), task.yaml for llmtrain eval"
    )


def _conversations(source: Source, num: int, seed: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(source, num * _TRIES_A_ROW, seed):
        if row["question"] in found:
            continue
        steps = source.worked(row)
        if steps is not None:
            found[row["question"]] = _conversation(row, steps)
        if len(found) == num:
            return list(found.values())
    raise InputError(
        f"{source.dataset} has only {len(found)} different questions of this difficulty, and {num} are asked for",
        where="--rows",
        remedy="ask for fewer (--rows, --test-rows)",
    )


def _rows(source: Source, num: int, seed: int) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(
            f"reasoning-gym is not installed: {error}", remedy="python -m pip install 'llmtrain[tasks]'"
        ) from None
    yield from reasoning_gym.create_dataset(source.dataset, size=num, seed=seed, **source.settings)


def _conversation(row: dict[str, Any], steps: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"},
        {"role": "assistant", "content": f"{steps}\n<answer>{row['answer']}</answer>"},
    ]
    return {"messages": messages, "answer": row["answer"]}


class _Expression:
    """Works out whole numbers with + - * / and brackets, noting each operation.

    Only for what reasoning-gym wrote; its own solver evaluates the text as a program.
    """

    def __init__(self, text: str, steps: list[str]):
        self._tokens: list[str] = _TOKEN.findall(text)
        assert "".join(self._tokens) == "".join(text.split()), f"unknown characters in {text!r}"
        self._next, self._steps = 0, steps

    def value(self) -> int | None:
        """The result; None where a division leaves a remainder."""
        try:
            result = self._sum()
        except _Remainder:
            return None
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
        if operator == "/" and (right == 0 or left % right):
            raise _Remainder
        result = {"+": left + right, "-": left - right, "*": left * right}.get(operator)
        if result is None:
            result = left // right
        self._steps.append(f"{left} {operator} {right} = {result}")
        return result


class _Remainder(Exception):
    """A division that is not exact."""


TASK = r"""# Scores what follows the last user turn of each row. Run: llmtrain eval MODEL THIS_FILE
kind: exact_match
data: test.jsonl
messages: messages
answer: answer
max_new_tokens: 200
# What counts as the answer: the last <answer>...</answer>. A number is compared as a number.
extract: '<answer>\s*(?P<answer>.*?)\s*</answer>'
normalize: [strip, numeric]
# The share of completions that this matches as a whole is the format rate.
format: '.*<answer>\s*-?\d+(\.\d+)?\s*</answer>\s*'
"""
