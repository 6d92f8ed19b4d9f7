"""Answers read by a reward model as it was trained to read them, and what it makes of them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmtrain.data.conversations import Message
from llmtrain.data.examples import Example
from llmtrain.data.formats import read_examples
from llmtrain.data.groups import AnswerEncoder
from llmtrain.data.progress import row_progress
from llmtrain.errors import InputError
from llmtrain.evaluation.tasks import LoadedTask
from llmtrain.models.scorer import Scorer
from llmtrain.models.steps import Aggregate, aggregate, steps_of
from llmtrain.recipe.schema import JSONLSource
from llmtrain.recipe.schema.data import Format


@dataclass(frozen=True)
class Answer:
    """An answer to judge.

    Attributes:
        prompt: a text that goes on in the answer, or messages; None where the answer is a whole text or conversation.
        given: of the kind of the prompt; after messages it may be the text of the assistant's message.
        where: place of its record.
    """

    prompt: str | list[Message] | None
    given: str | list[Message]
    where: str
    tools: list[dict[str, Any]] | None = None


class Encoded(NamedTuple):
    """Ids of the prompt and the answer, and the places that are read: the last, or those where a step ends."""

    ids: list[int]
    ends: list[int]


class Judgement(NamedTuple):
    """A score; of a process model the aggregate of `steps`, the probabilities that each step is right."""

    score: float
    steps: list[float] | None = None


class Judge:
    """A reward model that is asked about answers.

    Args:
        how: a process model's probabilities of the steps become one number; None is product.
        batch_tokens: about so many positions are computed at once.

    Raises:
        InputError: `how` is given, and the model judges whole answers.
    """

    def __init__(self, scorer: Scorer, how: Aggregate | None = None, batch_tokens: int = 8192):
        if how is not None and scorer.kind == "outcome":
            raise InputError(
                f"{how} of the steps, and this reward model judges whole answers", remedy="leave aggregate out"
            )
        self._scorer, self._batch_tokens = scorer, batch_tokens
        self._encoder = AnswerEncoder(scorer.tokenizer, scorer.separator)
        self.how: Aggregate | None = (how or "product") if scorer.kind == "process" else None

    @property
    def judges_steps(self) -> bool:
        return self.how is not None

    def encode(self, answer: Answer) -> Encoded:
        """As tokens.

        Raises:
            InputError: the chat template does not write it, or its steps cannot be told apart.
        """
        if not self.judges_steps:
            ids = self._encoder.answer(answer.prompt, answer.given, answer.where, answer.tools)
            return Encoded(ids, [len(ids) - 1])
        separator = self._scorer.separator
        assert separator is not None
        prompt, text = _last_text(answer)
        # An answer of nothing is one step: no steps at all would be no mistake.
        return self.encode_steps(prompt, steps_of(text, separator) or [""], answer.where)

    def encode_steps(self, prompt: str | list[Message], steps: Sequence[str], where: str) -> Encoded:
        """As `encode`, of an answer whose steps are known."""
        encoded = Encoded(*self._encoder.steps(prompt, steps, where))
        if len(encoded.ends) != len(steps):
            raise InputError(
                "two of its steps end in one token, so that they cannot be judged apart",
                where=where,
                remedy="leave the row out, or use a model with another separator",
            )
        return encoded

    def fits(self, encoded: Encoded) -> bool:
        return self._scorer.window is None or len(encoded.ids) <= self._scorer.window

    def too_long(self, places: Sequence[str], rows: Sequence[Encoded], remedy: str) -> InputError | None:
        """What to say where some of the rows do not fit the model's window; None where all do."""
        long = [index for index, row in enumerate(rows) if not self.fits(row)]
        if not long:
            return None
        return InputError(
            f"{len(long)} of {len(rows)} answers with their prompts do not fit the reward model's window of "
            f"{self._scorer.window} tokens; this one has {len(rows[long[0]].ids)}",
            where=places[long[0]],
            remedy=remedy,
        )

    def judge(self, rows: Sequence[Encoded], take: Callable[[int, Judgement], None]) -> None:
        """Judges rows, the longest first, and gives each with its number to `take` as soon as it is done.

        Raises:
            InputError: a score is not finite.
        """
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        done = 0
        while done < len(order):
            part = order[done : done + max(1, self._batch_tokens // len(rows[order[done]].ids))]
            for index, judgement in zip(part, self._judged([rows[index] for index in part]), strict=True):
                take(index, judgement)
            done += len(part)

    def _judged(self, rows: Sequence[Encoded]) -> list[Judgement]:
        if self.how is None:
            return [Judgement(score) for score in self._scorer.scores([row.ids for row in rows], self._batch_tokens)]
        probabilities = self._scorer.step_scores(rows, self._batch_tokens)
        return [Judgement(aggregate(steps, self.how), steps) for steps in probabilities]


def _last_text(answer: Answer) -> tuple[str | list[Message], str]:
    """The prompt, and the text whose steps are judged: of messages that of the last one."""
    if answer.tools:
        raise InputError(
            "process reward models read no tools", where=answer.where, remedy="leave them out, or use an outcome model"
        )
    if isinstance(answer.given, str):
        return answer.prompt or "", answer.given
    *before, last = answer.given
    if not isinstance(last["content"], str):
        raise InputError(
            "the last message is no text, so it has no steps", where=answer.where, remedy="leave the row out"
        )
    return [*(answer.prompt or []), *before], last["content"]


def judged(judge: Judge, rows: Sequence[Encoded], what: str) -> list[Judgement]:
    """Of each row, with progress; `what` names the work."""
    found: dict[int, Judgement] = {}
    with row_progress(what, len(rows)) as progress:

        def take(index: int, judgement: Judgement) -> None:
            found[index] = judgement
            progress.advance()

        judge.judge(rows, take)
    return [found[index] for index in range(len(rows))]


def task_examples(loaded: LoadedTask, data: str, wanted: Format | None, limit: int | None) -> list[Example]:
    """The first examples of a task's file, which lies beside the task's.

    Args:
        wanted: the format; None where the file's first row tells it.

    Raises:
        InputError: it is not there, has none, or one is wrong.
    """
    source = JSONLSource(kind="jsonl", paths=[str(loaded.beside(data))], format=wanted or "auto")
    with loaded.errors_located("data"):
        examples = list(itertools.islice(read_examples(source), limit))
        if not examples:
            raise InputError(f"{data} has no rows", remedy="write one JSON object a line")
    return examples


def check_fit(judge: Judge, rows: Sequence[Encoded], places: Sequence[str]) -> None:
    """Raises InputError where a row does not fit the model's window."""
    error = judge.too_long(places, rows, "leave these rows out, or use another reward model")
    if error is not None:
        raise error
