"""Arithmetic with worked answers in a fixed format: rows of reasoning-gym as conversations, and the task to score them.

Where an answer can be worked out again there are also pairs of a right and a wrong answer, and answers with a label
for each step (slips.py). Training and held-out rows have no question in common, and no question comes twice.
"""

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.errors import InputError
from llmtrain.fetch.expressions import Worked, work_out
from llmtrain.fetch.slips import Slip, slip

log = logging.getLogger(__name__)

INSTRUCTION = "Work it out step by step, then end with the result as <answer>result</answer>."
_TRIES_A_ROW = 50  # questions that are drawn for one that is new, before they count as exhausted


@dataclass(frozen=True)
class Solved:
    """A question with its right answer.

    Attributes:
        steps: the lines that lead to the answer.
        expression: what the steps work out; None where they are a text of their own.
    """

    question: str
    steps: list[str]
    answer: str
    expression: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set of reasoning-gym, and how its rows are worked out.

    Attributes:
        dataset: reasoning-gym's name of it.
        solved: takes up a row; None where the row is no good.
        settings: of the data set: its difficulty.
    """

    dataset: str
    solved: Callable[[dict[str, Any]], Solved | None]
    settings: dict[str, Any] = field(default_factory=dict)


def _worked_out(row: dict[str, Any]) -> Solved | None:
    """One operation a line, in the order in which they are worked out."""
    expression = row["metadata"]["expression"]
    worked = work_out(expression)
    if worked is None or str(worked.value) != row["answer"]:
        return None
    return Solved(row["question"], _lines(worked), row["answer"], expression)


def _as_given(row: dict[str, Any]) -> Solved | None:
    """The worked solution that comes with the row."""
    text, _, answer = row["metadata"]["answer_cot"].rpartition("####")
    if not text.strip() or answer.strip() != row["answer"]:
        return None
    return Solved(row["question"], text.strip().split("\n"), row["answer"])


SOURCES = {
    "chain-sum": Source("chain_sum", _worked_out, dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1)),
    "basic-arithmetic": Source(
        "basic_arithmetic", _worked_out, dict(min_terms=2, max_terms=4, min_digits=1, max_digits=2)
    ),
    "gsm-symbolic": Source("gsm_symbolic", _as_given),
}


def write(source: Source, directory: Path, rows: int, test_rows: int, seed: int) -> str:
    """Writes train.jsonl, test.jsonl and a task of each, and pairs and steps where there are any; returns a line on it.

    Raises:
        InputError: reasoning-gym is not installed, or has fewer different questions.
    """
    solved = _solved(source, rows + test_rows, seed)
    # Small problems come often and are exhausted first: only a shuffle makes the two parts alike.
    random.Random(seed).shuffle(solved)  # noqa: S311 - no secret
    parts = {"": solved[test_rows:], "test-": solved[:test_rows]}
    _write_rows(directory / "train.jsonl", map(_conversation, parts[""]))
    _write_rows(directory / "test.jsonl", map(_conversation, parts["test-"]))
    (directory / "task.yaml").write_text(TASK, encoding="utf-8")
    # What is sampled to be learnt is not what is measured on.
    (directory / "train.yaml").write_text(TASK.replace("test.jsonl", "train.jsonl"), encoding="utf-8")
    told = [
        f"train.jsonl ({rows} rows), test.jsonl ({test_rows} rows, none of them in train), task.yaml for llmtrain "
        "eval, train.yaml for llmtrain rejection-sample"
    ]
    for prefix, part in parts.items():
        slips = _slips(part, f"{seed}/{prefix}")
        if slips:
            _write_rows(directory / f"{prefix}pairs.jsonl", (_pair(*one) for one in slips))
            _write_rows(directory / f"{prefix}steps.jsonl", (row for one in slips for row in _labelled(*one)))
            told.append(f"{prefix}pairs.jsonl ({len(slips)} rows), {prefix}steps.jsonl ({2 * len(slips)} rows)")
    if len(told) > 1:
        told.append("each pair a right answer and one with a slip, each row of steps one of these with its labels")
    return "; ".join(told)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _solved(source: Source, num: int, seed: int) -> list[Solved]:
    found: dict[str, Solved] = {}
    for row in _rows(source, num * _TRIES_A_ROW, seed):
        if row["question"] in found:
            continue
        solved = source.solved(row)
        if solved is not None:
            found[row["question"]] = solved
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


def _slips(part: Sequence[Solved], seed: str) -> list[tuple[Solved, Slip]]:
    """The questions on which one can slip, each with a slip."""
    chooser = random.Random(seed)  # noqa: S311 - no secret
    found = [(solved, slip(solved.expression, chooser)) for solved in part if solved.expression is not None]
    return [(solved, slipped) for solved, slipped in found if slipped is not None]


def _lines(worked: Worked) -> list[str]:
    return [str(operation) for operation in worked.operations]


def _asked(solved: Solved) -> dict[str, str]:
    return {"role": "user", "content": f"{solved.question}\n{INSTRUCTION}"}


def _answered(steps: Sequence[str], answer: object) -> list[str]:
    """An answer's lines."""
    return [*steps, f"<answer>{answer}</answer>"]


def _said(lines: Sequence[str]) -> dict[str, str]:
    return {"role": "assistant", "content": "\n".join(lines)}


def _conversation(solved: Solved) -> dict[str, Any]:
    return {"messages": [_asked(solved), _said(_answered(solved.steps, solved.answer))], "answer": solved.answer}


def _pair(solved: Solved, slipped: Slip) -> dict[str, Any]:
    return {
        "prompt": [_asked(solved)],
        "chosen": [_said(_answered(solved.steps, solved.answer))],
        "rejected": [_said(_answered(_lines(slipped.worked), slipped.worked.value))],
        "answer": solved.answer,
        "slip": slipped.kind,
    }


def _labelled(solved: Solved, slipped: Slip) -> Iterator[dict[str, Any]]:
    """The right answer's steps, and the wrong one's, which are right up to the slip."""
    asked = {"prompt": [_asked(solved)]}
    right = _answered(solved.steps, solved.answer)
    wrong = _answered(_lines(slipped.worked), slipped.worked.value)
    yield asked | {"completions": right, "labels": [True] * len(right), "answer": solved.answer, "slip": None}
    labels = [number < slipped.operation for number in range(len(wrong))]
    yield asked | {"completions": wrong, "labels": labels, "answer": solved.answer, "slip": slipped.kind}


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
