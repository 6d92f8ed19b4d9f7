"""Questions with a right answer: prompts from rows, answers from the model, a score for each."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.data.progress import row_progress
from llmtrain.data.records import Record
from llmtrain.errors import InputError
from llmtrain.evaluation.answers import equals, find, find_mathematics, mathematically_equals
from llmtrain.evaluation.asking import ask_about, check_all_fit, field_of, filled, read_examples
from llmtrain.evaluation.figures import Figure, mean
from llmtrain.evaluation.tasks import ExactMatch, LoadedTask, Math
from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request, Sampling
from llmtrain.sampling.generators import Generator, text_generator
from llmtrain.sampling.rows import read_rows
from llmtrain.sampling.samplers import Asked

Task = ExactMatch | Math


@dataclass(frozen=True)
class _Question:
    """A row as it is asked: token ids, the text or messages that they stand for, the right answers."""

    ids: list[int]
    shown: Any
    right: list[str]


def ask(
    loaded: LoadedTask, task: Task, saved: Saved, limit: int | None, batch_tokens: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The figures, and a row a question with all that was said.

    Raises:
        InputError: a file or a row is wrong, or a prompt does not fit the model.
    """
    with loaded.errors_located("data"):
        rows = read_rows(loaded.beside(task.data), loaded.where("data"))[:limit]
    examples = read_examples(loaded, task)
    questions = [_question(loaded, task, saved, row, examples) for row in rows]
    correct = [_scorer(loaded, task, question.right) for question in questions]
    sampling = Sampling(task.max_new_tokens, task.temperature, task.top_p, task.seed, tuple(task.stop))
    generator = _generator(loaded, task, saved, sampling, batch_tokens)
    lengths = [len(question.ids) for question in questions]
    check_all_fit(saved, rows, lengths, [generator.fits(question.ids) for question in questions], "prompts")
    answers = _answers(loaded, task, generator, questions)
    records = [
        _record(task, index, question, answers[index], correct[index]) for index, question in enumerate(questions)
    ]
    return _figures(task, records), records


def _generator(loaded: LoadedTask, task: Task, saved: Saved, sampling: Sampling, batch_tokens: int) -> Generator:
    asked = Asked() if task.diffusion is None or saved.diffusion is None else Asked(**task.diffusion.model_dump())
    try:
        return text_generator(saved, sampling, asked, batch_tokens)
    except InputError as error:  # it names an option of the command line
        key = (error.where or "").removeprefix("--").replace("-", "_")
        raise InputError(
            error.message,
            where=loaded.where(f"diffusion.{key}"),
            remedy="leave it out, or use a model or sampler that it is for",
        ) from None


def _answers(
    loaded: LoadedTask, task: Task, generator: Generator, questions: Sequence[_Question]
) -> list[list[Completion]]:
    requests = [
        Request(question.ids, index, sample)
        for index, question in enumerate(questions)
        for sample in range(task.samples)
    ]
    answers: dict[tuple[int, int], Completion] = {}
    with row_progress(f"{loaded.name}: answers", len(requests)) as progress:

        def take(number: int, completion: Completion) -> None:
            answers[requests[number].row, requests[number].sample] = completion
            progress.advance()

        generator.generate(requests, take)
    return [[answers[index, sample] for sample in range(task.samples)] for index in range(len(questions))]


def _record(
    task: Task, index: int, question: _Question, completions: Sequence[Completion], correct: Callable[[str], bool]
) -> dict[str, Any]:
    said = []
    for completion in completions:
        if task.extract is None and isinstance(task, Math):
            answer = find_mathematics(completion.text)
        else:
            answer = find(completion.text, task.extract, task.match)
        entry = {
            "text": completion.text,
            "finish_reason": completion.finish,
            "tokens": len(completion.ids),
            "answer": answer,
            "correct": answer is not None and correct(answer),
        }
        if task.format is not None:
            entry["format"] = re.fullmatch(task.format, completion.text, re.DOTALL) is not None
        said.append(entry)
    return {"row": index, "prompt": question.shown, "right": question.right, "completions": said}


def _figures(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Means over rows of each row's mean: several samples of one row are not several rows."""

    def rate(of: Callable[[Mapping[str, Any]], float]) -> Figure:
        return mean([sum(of(said) for said in row["completions"]) / len(row["completions"]) for row in records])

    figures = {"accuracy": rate(lambda said: said["correct"])}
    if task.samples > 1:
        figures[f"pass@{task.samples}"] = mean(
            [float(any(said["correct"] for said in row["completions"])) for row in records]
        )
    if task.format is not None:
        figures["format_rate"] = rate(lambda said: said["format"])
    figures["answered"] = rate(lambda said: said["answer"] is not None)
    figures["cut_off"] = rate(lambda said: said["finish_reason"] == "length")
    figures["tokens"] = rate(lambda said: said["tokens"])
    return figures


def _scorer(loaded: LoadedTask, task: Task, right: Sequence[str]) -> Callable[[str], bool]:
    if isinstance(task, ExactMatch):
        return equals(right, task.normalize)
    with loaded.errors_located("kind"):
        return mathematically_equals(right)


def _question(loaded: LoadedTask, task: Task, saved: Saved, row: Record, examples: Sequence[Record]) -> _Question:
    right = _right_answers(loaded, task, row)
    asked = ask_about(loaded, task, saved, row, examples, lambda example: _target(loaded, task, example))
    return _Question(asked.ids, asked.shown, right)


def _target(loaded: LoadedTask, task: Task, row: Record) -> str:
    if task.target is not None:
        return filled(loaded, row, task.target, "target")
    return f" {_right_answers(loaded, task, row)[0]}"


def _right_answers(loaded: LoadedTask, task: Task, row: Record) -> list[str]:
    given = field_of(loaded, row, task.answer, "answer")
    answers = given if isinstance(given, list) else [given]
    if not answers or any(isinstance(a, bool) or not isinstance(a, str | int | float) for a in answers):
        raise InputError(
            f"field {task.answer!r} is {given!r}: neither a text or a number nor a list of them",
            where=row.where,
            remedy=f"correct the row, or name another field at {loaded.where('answer')}",
        )
    found = [find(str(answer), task.answer_extract, task.match) for answer in answers]
    if None in found:
        raise InputError(
            f"answer_extract does not match the answer {answers[found.index(None)]!r}",
            where=row.where,
            remedy=f"correct the row, or the pattern at {loaded.where('answer_extract')}",
        )
    return [answer for answer in found if answer is not None]
