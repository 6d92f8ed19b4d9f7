"""Answers that were compared, scored by a reward model: does it prefer the better ones, and how surely?

    accuracy     share of a row's pairs in which the better answer has the higher score, ties half; the mean over rows
    margin       score of the better answer - score of the other
    ece          Bradley-Terry says P(better > other) = sigmoid(difference of the scores). Of each pair the model
                 prefers one answer, with confidence sigmoid(|difference|), from 0.5 to 1, and is right or not.

A row of K ranked answers has up to K(K-1)/2 pairs, which weigh 1 together. One in which two answers are the same, as
texts or as tokens, says nothing of the model: as in training it is left out, and counted. A process model's scores are
probabilities, of which differences are no log-odds: its calibration is measured by tasks of kind steps.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from llmtrain.data.examples import Example, Preference, Ranking
from llmtrain.errors import InputError
from llmtrain.evaluation.calibration import Bin, expected_error, reliability
from llmtrain.evaluation.figures import Figure, Measured, mean, wilson
from llmtrain.evaluation.judging import Answer, Encoded, Judge, Judgement, check_fit, judged, task_examples
from llmtrain.evaluation.tasks import LoadedTask, Pairs
from llmtrain.models.scorer import Scorer

QUANTILES = (5, 25, 50, 75, 95)  # percent, of the scores


class _Pair(NamedTuple):
    """Two answers of different ranks: their scores, and what the pair weighs, 1 over the pairs of its row."""

    better: float
    other: float
    weight: float

    @property
    def right(self) -> float:
        """1 where the better answer has the higher score, 0.5 where they are equal, 0 where it has the lower one."""
        return 0.5 + 0.5 * float(np.sign(self.better - self.other))

    @property
    def confidence(self) -> float:
        return 1 / (1 + math.exp(-abs(self.better - self.other)))


class _Row(NamedTuple):
    """Answers to compare, and their ranks, 1 the best; `number` is its own in the data."""

    number: int
    answers: list[Answer]
    ranks: list[int]
    encoded: list[Encoded]

    @property
    def has_twice(self) -> bool:
        """Whether two of its answers are the same."""
        texts = [answer.given.strip() if isinstance(answer.given, str) else answer.given for answer in self.answers]
        ids = [row.ids for row in self.encoded]
        return any(one == other for same in (texts, ids) for one, other in itertools.combinations(same, 2))


def measure(loaded: LoadedTask, task: Pairs, scorer: Scorer, limit: int | None, batch_tokens: int) -> Measured:
    """The figures, a row of the data each with its scores, and how the scores are distributed.

    Raises:
        InputError: a row is wrong or does not fit the model, or `aggregate` is not for it.
    """
    with loaded.errors_located("aggregate"):
        judge = Judge(scorer, task.aggregate, batch_tokens)
    every = [
        _row(loaded, judge, number, example)
        for number, example in enumerate(task_examples(loaded, task.data, None, limit))
    ]
    rows = [row for row in every if not row.has_twice]
    if not rows:
        raise InputError(
            f"in each of its {len(every)} rows two answers are the same, so there is nothing to compare",
            where=loaded.where("data"),
            remedy="name data with different answers",
        )
    encoded = [one for row in rows for one in row.encoded]
    check_fit(judge, encoded, [answer.where for row in rows for answer in row.answers])
    judgements = iter(judged(judge, encoded, f"{loaded.name}: answers"))
    records = [_record(row, [next(judgements) for _ in row.answers]) for row in rows]
    pairs = [_pairs(record) for record in records]
    scores = [score for record in records for score in record["scores"]]
    figures = _figures(records, pairs, scores)
    quantiles = np.percentile(scores, QUANTILES)
    details: dict[str, Any] = {"score_quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True))}
    if judge.how is None:
        bins = _calibration(pairs)
        figures["ece"] = Figure(expected_error(bins), None, len(rows), "of sigmoid(difference), 10 bins from 0.5 to 1")
        details["reliability"] = [asdict(found) for found in bins]
    else:
        how = f"{judge.how} of the steps"
        figures = {name: figure._replace(note=_noted(how, figure.note)) for name, figure in figures.items()}
    left_out = [row.answers[0].where for row in every if row.has_twice]
    if left_out:
        details["left_out"] = len(left_out)
        note = f"{len(left_out)} of {len(every)} rows left out with an answer twice, the first {left_out[0]}"
        figures["accuracy"] = figures["accuracy"]._replace(note=_noted(figures["accuracy"].note, note))
    return Measured(figures, records, details)


def _noted(*notes: str) -> str:
    return ", ".join(note for note in notes if note)


def _row(loaded: LoadedTask, judge: Judge, number: int, example: Example) -> _Row:
    match example:
        case Preference():
            given, ranks = [example.chosen, example.rejected], [1, 2]
        case Ranking():
            given, ranks = list(example.completions), example.ranks
        case _:
            raise InputError(
                "a task of kind pairs compares answers, and this row has none that were compared",
                where=example.where,
                remedy='write {"prompt": "...", "chosen": "...", "rejected": "..."} or '
                '{"prompt": "...", "completions": ["...", "..."], "ranks": [2, 1]}, '
                f"or name other data at {loaded.where('data')}",
            )
    if len(set(ranks)) < 2:
        raise InputError(
            "all of its answers have one rank, so there is nothing to compare",
            where=example.where,
            remedy="leave the row out",
        )
    answers = [Answer(example.prompt, answer, example.where, example.tools) for answer in given]
    return _Row(number, answers, list(ranks), [judge.encode(answer) for answer in answers])


def _record(row: _Row, judgements: Sequence[Judgement]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "row": row.number,
        "prompt": row.answers[0].prompt,
        "answers": [answer.given for answer in row.answers],
        "ranks": row.ranks,
        "scores": [judgement.score for judgement in judgements],
    }
    if judgements[0].steps is not None:
        record["step_scores"] = [judgement.steps for judgement in judgements]
    return record


def _pairs(record: Mapping[str, Any]) -> list[_Pair]:
    ranked = zip(record["ranks"], record["scores"], strict=True)
    both = [(one[1], other[1]) for one, other in itertools.permutations(ranked, 2) if one[0] < other[0]]
    return [_Pair(better, other, 1 / len(both)) for better, other in both]


def _figures(
    records: Sequence[Mapping[str, Any]], pairs: Sequence[Sequence[_Pair]], every: Sequence[float]
) -> dict[str, Figure]:
    """Means over rows: several pairs of one row are not several rows."""

    def of_pairs(value: Callable[[_Pair], float]) -> Figure:
        return mean([sum(pair.weight * value(pair) for pair in row) for row in pairs])

    def of_answers(best: bool) -> Figure:
        means = []
        for record in records:
            ranked = zip(record["ranks"], record["scores"], strict=True)
            scores = [score for rank, score in ranked if (rank == min(record["ranks"])) == best]
            means.append(sum(scores) / len(scores))
        return mean(means)

    accuracy = of_pairs(lambda pair: pair.right)
    low, high = wilson(accuracy)
    return {
        "accuracy": accuracy._replace(note=f"95 % from {low:.3f} to {high:.3f}"),
        "margin": of_pairs(lambda pair: pair.better - pair.other),
        "score_best": of_answers(best=True),
        "score_other": of_answers(best=False),
        "score_std": Figure(float(np.std(every, ddof=1)), None, len(records), "of all answers"),
    }


def _calibration(pairs: Sequence[Sequence[_Pair]]) -> list[Bin]:
    flat = [pair for row in pairs for pair in row]
    return reliability(
        [pair.confidence for pair in flat], [pair.right for pair in flat], [pair.weight for pair in flat], least=0.5
    )
