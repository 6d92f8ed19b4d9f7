"""What the commands are given that sample answers to a task's questions: the task, how to sample, a reward model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.errors import InputError
from llmtrain.evaluation.questions import (
    Question,
    Task,
    answer_in,
    check_questions_fit,
    generator_for,
    read_questions,
)
from llmtrain.evaluation.tasks import ExactMatch, LoadedTask, Math, load_task
from llmtrain.models.saved import Saved
from llmtrain.models.steps import Aggregate
from llmtrain.sampling.autoregressive import GREEDY_BELOW
from llmtrain.sampling.batched import Sampling
from llmtrain.sampling.command import ModelChoice
from llmtrain.sampling.generators import Generator
from llmtrain.sampling.partial import check_output, partial_of
from llmtrain.search.scoring import Grader


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn; the task has its own settings, which are for measuring.

    Attributes:
        num: answers to a question.
        max_new_tokens: None is the task's.
        limit: only so many questions.
        batch_tokens: about so many positions are computed at once.
    """

    num: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0
    limit: int | None = None
    batch_tokens: int = 8192

    def check(self, num: int, where: str) -> None:
        """Raises InputError where `num` answers, which the option `where` asks for, would be one."""
        if num > 1 and self.temperature < GREEDY_BELOW:
            raise InputError(
                f"{self.temperature:g}: the {num} samples of a greedy model are all the same",
                where="--temperature",
                remedy=f"give one above 0, such as 1, or {where} 1",
            )


@dataclass(frozen=True)
class RewardChoice:
    """A reward model that judges answers.

    Attributes:
        name: a run, model or adapter directory, or a hub name.
        base: the model under it, where it is an adapter and not the one that it names.
        aggregate: of a process model's steps; None is product.
    """

    name: str
    base: str | None = None
    aggregate: Aggregate | None = None

    def load(self, beside: ModelChoice, batch_tokens: int) -> Grader:
        """Holds it as the policy, `beside`, is held.

        Raises:
            InputError: it is not there, or does not score.
        """
        try:
            scorer = replace(beside, name=self.name, base=self.base).load_scorer()
        except InputError as error:  # it names the arguments of commands that have one model, or none
            where = {"": "--scorer", "MODEL_OR_RUN": "--scorer", "--base": "--scorer-base"}
            given = error.where or ""
            remedy = error.remedy and error.remedy.replace("--base", "--scorer-base")
            raise InputError(error.message, where=where.get(given, given), remedy=remedy) from None
        try:
            return Grader(scorer, self.aggregate, batch_tokens)
        except InputError as error:
            raise InputError(error.message, where="--aggregate", remedy="leave it out") from None


def load_questions_task(file: Path) -> tuple[LoadedTask, Task]:
    """A task with questions that are answered in words.

    Raises:
        InputError: it is none, or a mistake is in it.
    """
    loaded = load_task(file)
    if not isinstance(loaded.task, ExactMatch | Math):
        raise InputError(
            f"kind {loaded.task.kind} has no questions that a model answers in words",
            where=loaded.where("kind"),
            remedy="give a task of kind exact_match or math",
        )
    return loaded, loaded.task


def check_outputs(files: dict[str, Path | None]) -> None:
    """Raises InputError where a file that is to be written, by its option, exists or cannot be made, or two are one.

    Until --output is whole, what is done stands in OUTPUT.partial, which is none of the others then.
    """
    given = {where: file for where, file in files.items() if file is not None}
    kept = partial_of(given["--output"]) if "--output" in given else None
    for where, file in given.items():
        if kept is not None and file.resolve() == kept.resolve():
            raise InputError(
                f"{file} is where --output is begun, and is removed at the end", where=where, remedy="name another file"
            )
        check_output(file, where)
        others = {other: path.resolve() for other, path in given.items() if other != where}
        twin = next((other for other, path in others.items() if path == file.resolve()), None)
        if twin is not None:
            raise InputError(f"{file} is that of {twin}, too", where=where, remedy="name another file")


def check_inputs(output: Path, loaded: LoadedTask, task: Task, *others: Path) -> None:
    """Raises InputError where the task, its data or another file that is read is OUTPUT.partial."""
    data = [task.data] if task.fewshot is None else [task.data, task.fewshot.data]
    check_output(output, inputs=[loaded.file, *map(loaded.beside, data), *others])


@dataclass(frozen=True)
class Asked:
    """A model and the questions that it is asked.

    Attributes:
        generator: draws as the user said.
    """

    loaded: LoadedTask
    task: Task
    saved: Saved
    questions: Sequence[Question]
    generator: Generator

    @classmethod
    def load(
        cls, choice: ModelChoice, loaded: LoadedTask, task: Task, drawing: Drawing, answered: bool = True
    ) -> "Asked":
        """
        Args:
            answered: each question has a right answer.

        Raises:
            InputError: the model is not there, a row is wrong, or a prompt leaves no room for an answer.
        """
        saved = choice.load()
        questions = read_questions(loaded, task, saved, drawing.limit, answered)
        sampling = Sampling(
            drawing.max_new_tokens or task.max_new_tokens,
            drawing.temperature,
            drawing.top_p,
            drawing.seed,
            tuple(task.stop),
        )
        generator = generator_for(loaded, task, saved, sampling, drawing.batch_tokens)
        check_questions_fit(saved, questions, generator)
        return cls(loaded, task, saved, questions, generator)

    def is_correct(self, question: Question, text: str) -> bool:
        """Whether the answer in a text is right."""
        answer = answer_in(self.task, text)
        return answer is not None and question.is_right(answer)

    def is_formatted(self, text: str) -> bool | None:
        """Whether the task's format matches a text; None where it has none."""
        return None if self.task.format is None else re.fullmatch(self.task.format, text, re.DOTALL) is not None
