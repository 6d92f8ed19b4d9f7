"""Answers in steps, each right or wrong, judged by a process reward model.

    step_accuracy      share of the steps that it takes for what they are: right where its probability is 0.5 or more
    first_error        of the answers with a wrong step, in how many the first step below 0.5 is the first wrong one
    no_error           of the answers without one, in how many no step is below 0.5
    f1                 2 first_error no_error / (first_error + no_error): ProcessBench's measure (arXiv 2412.06559)
    solution_accuracy  share of the answers that it takes for what they are, by their aggregate: right from 0.5 on
    solution_auc       the probability that a right answer's aggregate is above that of one with an error
    ece                of the steps' probabilities, ten bins

An answer is right where all of its steps are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmtrain.data.examples import Stepwise
from llmtrain.errors import InputError
from llmtrain.evaluation.calibration import expected_error, reliability
from llmtrain.evaluation.figures import Figure, Measured, auc, mean, ratio
from llmtrain.evaluation.judging import Judge, Judgement, check_fit, judged, task_examples
from llmtrain.evaluation.tasks import LoadedTask, Steps
from llmtrain.models.scorer import Scorer
from llmtrain.models.steps import one_step

_RIGHT = 0.5  # the probability from which on a step, or an answer, is taken for right


def measure(loaded: LoadedTask, task: Steps, scorer: Scorer, limit: int | None, batch_tokens: int) -> Measured:
    """The figures, and a row of the data each with the probabilities of its steps.

    Raises:
        InputError: the model judges whole answers, or a row is wrong or does not fit it.
    """
    if scorer.kind == "outcome":
        raise InputError(
            "judges steps, and this reward model judges whole answers",
            where=loaded.where("kind"),
            remedy="use kind: pairs, or a model trained by algorithm process_reward",
        )
    judge = Judge(scorer, task.aggregate, batch_tokens)
    every = [
        example
        for example in task_examples(loaded, task.data, "stepwise", limit)
        if isinstance(example, Stepwise)  # all are, which the type does not say
    ]
    rows = [number for number, example in enumerate(every) if _is_cut_alike(example, scorer)]
    if not rows:
        raise InputError(
            f"each of its {len(every)} rows has a step that the model's separator {scorer.separator!r} would cut",
            where=loaded.where("data"),
            remedy="name data with other steps, or use a model with another separator",
        )
    examples = [every[number] for number in rows]
    encoded = [judge.encode_steps(example.prompt, example.completions, example.where) for example in examples]
    check_fit(judge, encoded, [example.where for example in examples])
    judgements = judged(judge, encoded, f"{loaded.name}: answers")
    records = [
        _record(number, example, judgement)
        for number, example, judgement in zip(rows, examples, judgements, strict=True)
    ]
    steps = [step for record in records for step in zip(record["step_scores"], record["labels"], strict=True)]
    bins = reliability([probability for probability, _ in steps], [float(label) for _, label in steps])
    figures = _figures(records, str(judge.how))
    figures["ece"] = Figure(expected_error(bins), None, len(records), "of the steps, 10 bins")
    details: dict[str, Any] = {"reliability": [asdict(found) for found in bins]}
    left_out = [example.where for number, example in enumerate(every) if number not in set(rows)]
    if left_out:
        details["left_out"] = len(left_out)
        note = (
            f"{len(left_out)} of {len(every)} rows left out with steps that the separator cuts, the first {left_out[0]}"
        )
        figures["step_accuracy"] = figures["step_accuracy"]._replace(note=note)
    return Measured(figures, records, details)


def _is_cut_alike(example: Stepwise, scorer: Scorer) -> bool:
    """Whether an answer of its steps would be cut into these again: as in training, others are left out."""
    assert scorer.separator is not None
    return all(one_step(step, scorer.separator) is not None for step in example.completions)


def _record(index: int, example: Stepwise, judgement: Judgement) -> dict[str, Any]:
    assert judgement.steps is not None
    return {
        "row": index,
        "prompt": example.prompt,
        "steps": example.completions,
        "labels": example.labels,
        "step_scores": judgement.steps,
        "score": judgement.score,
        "first_error": _first([not label for label in example.labels]),
        "first_error_found": _first([probability < _RIGHT for probability in judgement.steps]),
    }


def _first(wrong: Sequence[bool]) -> int | None:
    """The number of the first wrong step, from 0; None where there is none."""
    return wrong.index(True) if True in wrong else None


def _figures(records: Sequence[Mapping[str, Any]], how: str) -> dict[str, Figure]:
    hits: list[float] = []
    right: list[Mapping[str, Any]] = []
    wrong: list[Mapping[str, Any]] = []
    for record in records:
        steps = zip(record["step_scores"], record["labels"], strict=True)
        hits.append(sum(float((probability >= _RIGHT) == label) for probability, label in steps))
        (right if record["first_error"] is None else wrong).append(record)
    figures = {"step_accuracy": ratio(hits, [len(record["labels"]) for record in records])}
    for name, some in (("first_error", wrong), ("no_error", right)):
        if some:
            figures[name] = mean([float(row["first_error_found"] == row["first_error"]) for row in some])
    if right and wrong:
        figures["f1"] = _harmonic(figures["first_error"], figures["no_error"])
    figures["solution_accuracy"] = mean(
        [float((row["score"] >= _RIGHT) == (row["first_error"] is None)) for row in records]
    )._replace(note=f"{how} of the steps")
    if right and wrong:
        found = auc([row["score"] for row in right], [row["score"] for row in wrong])
        figures["solution_auc"] = found._replace(note=f"{how} of the steps")
    return figures


def _harmonic(one: Figure, other: Figure) -> Figure:
    both = one.value + other.value
    return Figure(2 * one.value * other.value / both if both else 0.0, None, one.rows + other.rows)
