"""`llmtrain label-steps`: which steps of solutions are right, found by rolling out from them (Math-Shepherd).

arXiv 2312.08935, section 3.3. From the end of step i, N completions are sampled from the model. With c of them right,

    hard estimation (eq. 3)   label_i = c > 0
    soft estimation (eq. 4)   value_i = c / N

The last step ends the solution, so that its value is whether the solution is right. After a step from which nothing
is right a wrong solution is not rolled out any further, unless all steps are asked for: what follows a dead end is
labelled wrong, and has no value. (The paper rolls out from every step.)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from llmtrain.data.conversations import ASSISTANT
from llmtrain.data.records import Record
from llmtrain.errors import EXIT_DONE, InputError
from llmtrain.models.steps import steps_of
from llmtrain.sampling.batched import Request
from llmtrain.sampling.command import ModelChoice
from llmtrain.sampling.partial import Partial, Unit, partial_of
from llmtrain.sampling.prompts import encode_begun
from llmtrain.sampling.rows import read_rows
from llmtrain.search.given import Asked, Drawing, check_inputs, check_outputs, load_questions_task
from llmtrain.search.provenance import digest, header, provenance
from llmtrain.tables import print_table


@dataclass(frozen=True)
class Options:
    """What is labelled, and how.

    Attributes:
        output: JSONL file, format stepwise.
        input: JSONL file of solutions; None draws them from the model.
        rollouts: completions from the end of each step.
        separator: between steps.
        all_steps: roll out from what follows a dead end, too.
    """

    output: Path
    input: Path | None = None
    rollouts: int = 8
    separator: str = "\n"
    all_steps: bool = False


@dataclass(frozen=True)
class Solution:
    """A whole answer in steps.

    Attributes:
        question: its number.
        number: of the solutions to the question.
        steps: without the separators, not blank, at least one.
        right: whether the task says so.
        where: its place, for messages.
    """

    question: int
    number: int
    steps: tuple[str, ...]
    right: bool
    where: str


@dataclass(frozen=True)
class _Given:
    """Texts of solutions, by question, and how many were left out."""

    texts: list[tuple[int, str, str]]
    cut_off: int = 0


def label_steps(choice: ModelChoice, file: Path, drawing: Drawing, options: Options) -> int:
    """Labels the steps of solutions; returns the exit code.

    Args:
        drawing: of solutions, where none are given, and of what is rolled out. With given ones its limit is of these.

    Raises:
        InputError: something that was given is wrong or does not fit together, or there is nothing to label.
        TrainingError: the disk is full.
    """
    _check(drawing, options)
    loaded, task = load_questions_task(file)
    check_inputs(options.output, loaded, task, *([] if options.input is None else [options.input]))
    rows = None if options.input is None else read_rows(options.input, "--input")[: drawing.limit]
    asked = Asked.load(choice, loaded, task, drawing if rows is None else _unlimited(drawing))
    given = None if rows is None else _given(asked, rows)
    settings = asked.generator.settings()
    work: dict[str, Any] = {"num": drawing.num}
    if given is not None:
        work = {"solutions_sha256": digest([(question, text) for question, text, _ in given.texts])}
    work |= {"rollouts": options.rollouts, "separator": options.separator}
    partial = Partial(options.output, header("label-steps", asked.saved, asked.questions, settings, **work))
    found = given or _drawn(asked, partial, drawing.num)
    solutions = _solutions(asked, found, options)
    values = [list[float]() for _ in solutions]
    _roll_out(asked, partial, solutions, values, options)
    source = provenance(loaded, asked.saved, settings) | {"rollouts": options.rollouts, "separator": options.separator}
    partial.finish({options.output: _rows(asked, solutions, values, source)})
    _show(found, solutions, values)
    typer.echo(f"{options.output}: {len(solutions)} rows")
    return EXIT_DONE


def _check(drawing: Drawing, options: Options) -> None:
    """What can be said before anything is read."""
    check_outputs({"--output": options.output})
    drawing.check(options.rollouts, "--rollouts")
    if options.input is None:
        drawing.check(drawing.num, "--num")
    if not options.separator:
        raise InputError("is empty", where="--separator", remedy=r"give what stands between steps, such as '\n'")


def _unlimited(drawing: Drawing) -> Drawing:
    """For the questions of a task, where the solutions are limited."""
    return replace(drawing, limit=None)


def _given(asked: Asked, rows: Sequence[Record]) -> _Given:
    """The solutions in rows of --input, each of which repeats a question of the task."""
    numbers: dict[str, int] = {}
    for number, question in enumerate(asked.questions):
        numbers.setdefault(_canonical(question.shown), number)
    texts, cut_off = [], 0
    for row in rows:
        shown, text = _solved(row)
        asked_as = _canonical(shown)
        if asked_as not in numbers:
            raise InputError(
                "the prompt is none of the task's, so that its right answer is not known",
                where=row.where,
                remedy=f"give solutions to questions as {asked.loaded.file} asks them",
            )
        if row.fields.get("cut_off") is True:  # as `llmtrain rejection-sample --no-rule` says; it has no last step
            cut_off += 1
        else:
            texts.append((numbers[asked_as], text, row.where))
    return _Given(texts, cut_off)


def _canonical(shown: Any) -> str:
    return json.dumps(shown, sort_keys=True, ensure_ascii=False)


def _solved(row: Record) -> tuple[Any, str]:
    """What was asked and what was said."""
    prompt: Any = row.fields.get("prompt")
    said: Any = row.fields.get("completion")
    messages: Any = row.fields.get("messages")
    if isinstance(messages, list) and messages and prompt is None:
        prompt, said = messages[:-1], messages[-1:]
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict) and said[0].get("role") == ASSISTANT:
        said = said[0].get("content")
    if prompt is None or not isinstance(said, str):
        raise InputError(
            f"no solution: it has {', '.join(row.fields) or 'no field'}",
            where=row.where,
            remedy="write prompt and completion, or messages that end with the assistant's; "
            "`llmtrain rejection-sample --no-rule` writes such files",
        )
    return prompt, said


def _drawn(asked: Asked, partial: Partial, num: int) -> _Given:
    """Solutions of the model itself; those that were cut off have no last step, and are left out."""
    units: dict[Unit, list[Request]] = {
        (row,): [Request(question.ids, row, sample) for sample in range(num)]
        for row, question in enumerate(asked.questions)
    }
    partial.answer(asked.generator, units, f"{asked.loaded.name}: solutions")
    said = [(row, answer, asked.questions[row].row.where) for (row,) in units for answer in partial.completions[(row,)]]
    whole = [(row, answer["text"], where) for row, answer, where in said if answer["finish_reason"] != "length"]
    return _Given(whole, len(said) - len(whole))


def _solutions(asked: Asked, given: _Given, options: Options) -> list[Solution]:
    """Solutions in steps, each once.

    Raises:
        InputError: there is none.
    """
    found: dict[tuple[int, tuple[str, ...]], Solution] = {}
    numbers = [0] * len(asked.questions)
    for row, text, where in given.texts:
        steps = tuple(steps_of(text, options.separator))
        if steps and (row, steps) not in found:
            right = asked.is_correct(asked.questions[row], text)
            found[row, steps] = Solution(row, numbers[row], steps, right, where)
            numbers[row] += 1
    if not found:
        cut = f"; {given.cut_off} were cut off" if given.cut_off else ""
        if options.input is not None:
            raise InputError(f"no solution has a step{cut}", where="--input", remedy="give solutions that end")
        raise InputError(
            f"no solution has a step{cut}",
            where="TASK",
            remedy=f"remove {partial_of(options.output)}, and let answers be longer (--max-new-tokens), or give "
            "solutions by --input",
        )
    return list(found.values())


def _roll_out(
    asked: Asked, partial: Partial, solutions: Sequence[Solution], values: list[list[float]], options: Options
) -> None:
    """Fills in the values of the solutions' steps, up to where it is given up.

    All solutions go on together, a step at a time.
    """
    prefixes = _prefixes(asked, solutions, options)
    for depth in range(max(len(solution.steps) for solution in solutions)):
        units: dict[Unit, list[Request]] = {}
        for index, solution in enumerate(solutions):
            dead = not options.all_steps and not solution.right and values[index][-1:] == [0.0]
            if depth < len(prefixes[index]) and not dead:
                first = solution.number * options.rollouts
                units[index, depth] = [
                    Request(prefixes[index][depth], solution.question, first + number, part=depth + 1)
                    for number in range(options.rollouts)
                ]
        partial.answer(asked.generator, units, f"{asked.loaded.name}: rollouts from step {depth + 1}")
        for index, _ in units:
            solution = solutions[index]
            begun = _begun(solution, depth, options.separator)
            right = [
                asked.is_correct(asked.questions[solution.question], begun + said["text"])
                for said in partial.completions[index, depth]
            ]
            values[index].append(sum(right) / len(right))


def _begun(solution: Solution, depth: int, separator: str) -> str:
    """The solution up to the end of a step."""
    return separator.join([*solution.steps[: depth + 1], ""])


def _prefixes(asked: Asked, solutions: Sequence[Solution], options: Options) -> list[list[list[int]]]:
    """Token ids that are rolled out from: of each solution those up to the end of each step but the last.

    Raises:
        InputError: one is as long as the model's window.
    """
    encoded = []
    for solution in solutions:
        shown = asked.questions[solution.question].shown
        depths = range(len(solution.steps) - 1)
        begun = [_begun(solution, depth, options.separator) for depth in depths]
        own = [encode_begun(asked.saved.tokenizer, shown, text, solution.where) for text in begun]
        if own and not asked.generator.fits(own[-1]):
            raise InputError(
                f"the question with all steps but the last has {len(own[-1])} tokens, and the model's window is "
                f"{asked.saved.window}",
                where=solution.where,
                remedy="leave this solution out, or use a model with a longer window",
            )
        encoded.append(own)
    return encoded


def _rows(
    asked: Asked, solutions: Sequence[Solution], values: Sequence[Sequence[float]], source: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for solution, own in zip(solutions, values, strict=True):
        whole = _whole(solution, own)
        yield {
            "prompt": asked.questions[solution.question].shown,
            "completions": list(solution.steps),
            "labels": [value is not None and value > 0 for value in whole],
            "values": whole,
            "question": solution.question,
            "solution": solution.number,
            "correct": solution.right,
            "provenance": source,
        }


def _whole(solution: Solution, values: Sequence[float]) -> list[float | None]:
    """With the last step's value, and None where there was no rolling out."""
    skipped = len(solution.steps) - 1 - len(values)
    return [*values, *[None] * skipped, float(solution.right)]


def _show(given: _Given, solutions: Sequence[Solution], values: Sequence[Sequence[float]]) -> None:
    labels = [
        value is not None and value > 0
        for solution, own in zip(solutions, values, strict=True)
        for value in _whole(solution, own)
    ]
    questions: dict[int, bool] = {}
    for solution, own in zip(solutions, values, strict=True):
        questions[solution.question] = questions.get(solution.question, False) or solution.right or any(own)
    counts = {
        "questions": len(questions),
        "questions without a right answer": sum(not solved for solved in questions.values()),
        "solutions": len(solutions),
        "right": sum(solution.right for solution in solutions),
        "duplicates or empty": len(given.texts) - len(solutions),
        "cut off": given.cut_off,
        "steps": len(labels),
        "steps labelled right": sum(labels),
        "steps rolled out from": sum(len(own) for own in values),
    }
    print_table(("figure", "number"), [(name, str(count)) for name, count in counts.items()], right=("number",))
