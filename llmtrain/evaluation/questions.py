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
class Question:
    """A row as it is asked.

    Attributes:
        ids: the prompt's tokens.
        shown: the text or messages that they stand for.
        right: the right answers.
        is_right: whether an answer, as `answer_in` finds it, is one of them.
        row: where it comes from.
    """

    ids: list[int]
    shown: str | list[Any]
    right: list[str]
    is_right: Callable[[str], bool]
    row: Record


def ask(
    loaded: LoadedTask, task: Task, saved: Saved, limit: int | None, batch_tokens: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The figures, and a row a question with all that was said.

    Raises:
        InputError: a file or a row is wrong, or a prompt does not fit the model.
    """
    questions = read_questions(loaded, task, saved, limit)
    sampling = Sampling(task.max_new_tokens, task.temperature, task.top_p, task.seed, tuple(task.stop))
    generator = generator_for(loaded, task, saved, sampling, batch_tokens)
    check_questions_fit(saved, questions, generator)
    answers = _answers(loaded, task, generator, questions)
    records = [_record(task, index, question, answers[index]) for index, question in enumerate(questions)]
    return _figures(task, records), records


def read_questions(
    loaded: LoadedTask, task: Task, saved: Saved, limit: int | None = None, answered: bool = True
) -> list[Question]:
    """The rows of a task, as this model is asked them.

    Args:
        limit: only the first so many.
        answered: each has a right answer; else the rows may lack it, and no answer is right.

    Raises:
        InputError: a file or a row is wrong.
    """
    with loaded.errors_located("data"):
        rows = read_rows(loaded.beside(task.data), loaded.where("data"))[:limit]
    examples = read_examples(loaded, task)
    return [_question(loaded, task, saved, row, examples, answered) for row in rows]


def check_questions_fit(saved: Saved, questions: Sequence[Question], generator: Generator) -> None:
    """Raises InputError where a prompt leaves the model no room for an answer."""
    rows, lengths = [question.row for question in questions], [len(question.ids) for question in questions]
    check_all_fit(saved, rows, lengths, [generator.fits(question.ids) for question in questions], "prompts")


def answer_in(task: Task, text: str) -> str | None:
    """The answer in what the model said; None where it gave none."""
    if task.extract is None and isinstance(task, Math):
        return find_mathematics(text)
    return find(text, task.extract, task.match)


def comparison(loaded: LoadedTask, task: Task, right: Sequence[str]) -> Callable[[str], bool]:
    """Whether an answer is one of these, as the task compares answers.

    Raises:
        InputError: math-verify is wanted and not installed.
    """
    if isinstance(task, ExactMatch):
        return equals(right, task.normalize)
    with loaded.errors_located("kind"):
        return mathematically_equals(right)


def generator_for(loaded: LoadedTask, task: Task, saved: Saved, sampling: Sampling, batch_tokens: int) -> Generator:
    """What answers as the task says that this model, autoregressive or diffusion, shall write.

    Raises:
        InputError: the task's key `diffusion` does not fit the model.
    """
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
    loaded: LoadedTask, task: Task, generator: Generator, questions: Sequence[Question]
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


def _record(task: Task, index: int, question: Question, completions: Sequence[Completion]) -> dict[str, Any]:
    said = []
    for completion in completions:
        answer = answer_in(task, completion.text)
        entry = {
            "text": completion.text,
            "finish_reason": completion.finish,
            "tokens": len(completion.ids),
            "answer": answer,
            "correct": answer is not None and question.is_right(answer),
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


def _question(
    loaded: LoadedTask, task: Task, saved: Saved, row: Record, examples: Sequence[Record], answered: bool
) -> Question:
    right = _right_answers(loaded, task, row) if answered else []
    asked = ask_about(loaded, task, saved, row, examples, lambda example: _target(loaded, task, example))
    return Question(asked.ids, asked.shown, right, comparison(loaded, task, right) if right else _never, row)


def _never(answer: str) -> bool:
    return False


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
