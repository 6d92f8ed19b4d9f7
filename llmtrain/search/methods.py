"""The methods by name, what they need, and running one with one budget on all questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmtrain.errors import InputError, nearest
from llmtrain.evaluation.questions import Question
from llmtrain.search.beam import beam_search
from llmtrain.search.curve import Result
from llmtrain.search.driver import ModelDriver
from llmtrain.search.mcts import tree_search
from llmtrain.search.paths import Driver, Found
from llmtrain.search.sampled import Choice, Samples, best_of_n, numbered, vote, weighted_vote
from llmtrain.search.scoring import Grader

Choose = Callable[[Samples, int], Choice]
Search = Callable[[Driver, int, int], list[Found]]

# Choose among whole answers; each with whether it needs scores of them.
SAMPLED: dict[str, tuple[Choose, bool]] = {
    "best-of-n": (best_of_n, True),
    "vote": (vote, False),
    "weighted-vote": (weighted_vote, True),
}
# Go on step by step, as a process reward model says.
STEPWISE: dict[str, Search] = {"beam": beam_search, "mcts": tree_search}
METHODS = (*SAMPLED, *STEPWISE)


def fitting(kind: Literal["outcome", "process"] | None) -> list[str]:
    """All methods that a reward model of this kind, or none, suffices for."""
    sampled = [name for name, (_, scored) in SAMPLED.items() if kind is not None or not scored]
    return [*sampled, *STEPWISE] if kind == "process" else sampled


def check_methods(names: Sequence[str]) -> None:
    """Raises InputError for a name that is none."""
    for name in names:
        if name not in METHODS:
            raise InputError(
                f"there is no method {name!r}{nearest(name, METHODS)}",
                where="--methods",
                remedy=f"choose from {', '.join(METHODS)}, with commas between them",
            )


def check_scorer(names: Sequence[str], kind: Literal["outcome", "process"] | None) -> None:
    """Raises InputError for a method that needs another reward model than there is."""
    able = fitting(kind)
    for name in names:
        if name in able:
            continue
        wanted = "a process reward model, which judges steps" if name in STEPWISE else "a reward model"
        there = "none is given" if kind is None else "this one judges whole answers"
        raise InputError(
            f"{name} needs {wanted}, and {there}",
            where="--methods" if kind is None else "--scorer",
            remedy=f"give one by --scorer, or choose --methods {','.join(able)}",
        )


@dataclass(frozen=True)
class Drawn:
    """A whole answer to a question.

    Attributes:
        said: its text, finish_reason and tokens.
    """

    said: Mapping[str, Any]
    answer: str | None
    is_right: bool
    score: float | None = None
    read: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity."""
        finite = self.score is not None and np.isfinite(self.score)
        return {
            **self.said,
            "answer": self.answer,
            "correct": self.is_right,
            **({} if self.score is None else {"score": self.score if finite else None}),
        }


def drawn(
    question: Question, said: Mapping[str, Any], answer: str | None, score: float | None = None, read: int = 0
) -> Drawn:
    """What was said with its answer, compared with the right ones."""
    return Drawn(said, answer, answer is not None and question.is_right(answer), score, read)


@dataclass(frozen=True)
class Pool:
    """The whole answers to a question that methods choose among, as arrays, too."""

    drawn: Sequence[Drawn]
    samples: Samples

    @classmethod
    def of(cls, drawn: Sequence[Drawn], grader: Grader | None, same: Callable[[str], Callable[[str], bool]]) -> "Pool":
        """
        Args:
            grader: what scored them.
            same: of an answer, what says whether another is the same.
        """
        scores = weights = None
        if grader is not None:
            scores = np.asarray([sample.score for sample in drawn], dtype=np.float64)
            weights = scores if grader.judges_steps else 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
        correct = np.asarray([sample.is_right for sample in drawn])
        votes = numbered([sample.answer for sample in drawn], same)
        return cls(drawn, Samples(correct, votes, scores, weights))


def choose(name: str, budget: int, pool: Pool) -> Result:
    """What a method makes of the samples of one question; those beyond the budget make it surer, and cost nothing."""
    method, needs_scores = SAMPLED[name]
    choice = method(pool.samples, budget)
    generated = budget * float(np.mean([sample.said["tokens"] for sample in pool.drawn]))
    read = budget * float(np.mean([sample.read for sample in pool.drawn])) if needs_scores else 0.0
    answer = None if choice.chosen is None else pool.drawn[choice.chosen].answer
    told = {"sample": choice.chosen, "answer": answer, "accuracy": choice.accuracy}
    return Result(choice.accuracy, generated, read, told)


def search(
    name: str,
    budget: int,
    width: int,
    driver: ModelDriver,
    questions: Sequence[Question],
    answer_in: Callable[[str], str | None],
) -> list[Result]:
    """What a method that goes step by step finds, for each question."""
    results = []
    for found in STEPWISE[name](driver, budget, width):
        number = found.path.question
        sample = drawn(questions[number], found.path.plain(), answer_in(found.path.text), found.value)
        spent = driver.spent[number]
        told = {**sample.plain(), "generated": spent.generated, "scorer_tokens": spent.read}
        results.append(Result(float(sample.is_right), spent.generated, spent.read, told))
    return results
