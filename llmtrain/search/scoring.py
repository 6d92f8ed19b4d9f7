"""Answers that a model just wrote, judged by a reward model, which reads prompt and answer as it was trained to.

A reward model has a tokenizer and a chat template of its own: what another model was asked, a text or messages, and
what it said are encoded by these (`evaluation/judging.py`). An answer that it cannot read, because it is longer than
its window, or because the template does not write it, gets the worst score there is, and is counted: hours of answers
are not lost for it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from llmtrain.errors import InputError
from llmtrain.evaluation.judging import Answer, Encoded, Judge, Judgement
from llmtrain.models.scorer import Scorer
from llmtrain.models.steps import Aggregate

log = logging.getLogger(__name__)

Shown = str | list[Any]
"""What was asked: a text that goes on, or messages."""

_CHUNK = 256  # answers that are encoded before they are scored


class Grader:
    """Scores answers.

    Args:
        how: a process model's probabilities of the steps become one number by product, min or last; default: product.
        batch_tokens: about so many positions are computed at once.

    Attributes:
        scorer: as given.
        separator: ends a step; None where whole answers are judged.

    Raises:
        InputError: `how` is given, and the model judges whole answers.
    """

    def __init__(self, scorer: Scorer, how: Aggregate | None = None, batch_tokens: int = 8192):
        self.scorer = scorer
        self._judge = Judge(scorer, how, batch_tokens)
        self.separator = scorer.separator if self._judge.judges_steps else None
        self.how = self._judge.how
        self._unread: list[InputError] = []

    @property
    def judges_steps(self) -> bool:
        return self._judge.judges_steps

    @property
    def worst(self) -> float:
        """The score of what cannot be read: probability 0, or less than any score."""
        return 0.0 if self.judges_steps else -math.inf

    def check(self, prompts: Sequence[tuple[Shown, str]]) -> None:
        """Raises InputError where it cannot read an answer of a letter to a prompt; each is given with its place."""
        for shown, where in prompts:
            self._encoded(shown, "a", where)

    def score(
        self, answers: Sequence[tuple[Shown, str]], advance: Callable[[int], None] = lambda num: None
    ) -> tuple[list[float], list[int]]:
        """Of each (what was asked, what was said) the score, and the tokens that were read for it; see `tell_unread`.

        Args:
            advance: is told how many more were scored.

        Raises:
            InputError: a score is not finite.
        """
        scores, lengths = [self.worst] * len(answers), [0] * len(answers)
        for first in range(0, len(answers), _CHUNK):
            rows: dict[int, Encoded] = {}
            for index in range(first, min(first + _CHUNK, len(answers))):
                try:
                    rows[index] = self._encoded(*answers[index], f"answer {index + 1}")
                except InputError as error:
                    self._unread.append(error)
                    advance(1)
            places = list(rows)

            def take(number: int, judgement: Judgement, places: Sequence[int] = places) -> None:
                scores[places[number]] = judgement.score
                advance(1)

            self._judge.judge(list(rows.values()), take)
            for index, row in rows.items():
                lengths[index] = len(row.ids)
        return scores, lengths

    def _encoded(self, shown: Shown, answer: str, where: str) -> Encoded:
        encoded = self._judge.encode(Answer(shown, answer, where))
        too_long = self._judge.too_long([where], [encoded], "ask for shorter answers, or use another reward model")
        if too_long is not None:
            raise too_long
        return encoded

    def tell_unread(self, what: str) -> None:
        """Says how many answers could not be read since it was last called; `what` names whose they are."""
        if self._unread:
            log.warning(
                "%s: %d answers get the worst score, since the reward model cannot read them; of the first: %s",
                what,
                len(self._unread),
                self._unread[0].message,
            )
        self._unread = []


def score_answers(
    scorer: Scorer, answers: Sequence[tuple[Shown, str]], how: Aggregate | None = None, batch_tokens: int = 8192
) -> list[float]:
    """The score of each (what was asked, what was said); see `Grader`.

    Raises:
        InputError: a prompt cannot be read, or a score is not finite.
    """
    grader = Grader(scorer, how, batch_tokens)
    grader.check([(shown, f"answer {number}") for number, (shown, _) in enumerate(answers, start=1)])
    scores, _ = grader.score(answers)
    grader.tell_unread("scores")
    return scores
