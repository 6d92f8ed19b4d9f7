"""Process reward models on labelled steps, as a user measures them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from llmtrain.models.reward import Reward
from tests import counting, scorers
from tests.saved import CommandLine, Done, assert_refused

# The model takes a step for right as long as it has read few w50. Its errors: it finds the first one of row 1 too
# late, and one in row 3 that is none.
ROWS: list[dict[str, Any]] = [
    {"prompt": "w7", "completions": [" w9", " w10 w11"], "labels": [True, True]},
    {"prompt": "w7", "completions": [" w9", " w10", " w50 w50"], "labels": [True, False, False]},
    {"prompt": "w7", "completions": [" w50 w50", " w50 w50"], "labels": [False, False]},
    {"prompt": "w7", "completions": [" w50 w50"], "labels": [True]},
]
FILES = ("--output", "out.json", "--samples", "rows.out")
SLOPE, OFFSET = -1.5, 2.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "process": counting.write(base / "process", "process", SLOPE, OFFSET),
        "outcome": counting.write(base / "outcome", "outcome"),
        "random": scorers.write(base / "random", "process", Reward("process", separator=counting.SEPARATOR)),
    }


def write_task(*rows: Any, **settings: Any) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    Path("steps.yaml").write_text(json.dumps({"kind": "steps", "data": "rows.jsonl"} | settings))


def measured(done: Done) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert done.code == 0, done.err
    written = json.loads(Path("out.json").read_text())
    records = [json.loads(line) for line in Path("rows.out").read_text().splitlines()]
    return written["tasks"]["steps"], records


def whole(row: dict[str, Any]) -> str:
    text: str = row["prompt"] + "".join(step + counting.SEPARATOR for step in row["completions"])
    return text


def chances(row: dict[str, Any]) -> list[float]:
    return [counting.sigmoid(OFFSET + SLOPE * x) for x in counting.steps_seen(whole(row))]


def test_figures_by_hand(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    done = llmtrain("eval", models["process"], "steps.yaml", *FILES)
    task, records = measured(done)
    expected = [chances(row) for row in ROWS]
    for record, own, row in zip(records, expected, ROWS, strict=True):
        assert record["step_scores"] == pytest.approx(own, rel=1e-3)
        assert record["score"] == pytest.approx(math.prod(own), rel=1e-3)
        assert (record["labels"], record["steps"]) == (row["labels"], row["completions"])
    assert [record["first_error"] for record in records] == [None, 1, 0, None]
    assert [record["first_error_found"] for record in records] == [None, 2, 0, 0]
    figures = {name: figure["value"] for name, figure in task["figures"].items()}
    bins: dict[int, list[tuple[float, bool]]] = {}
    for own, row in zip(expected, ROWS, strict=True):
        for chance, label in zip(own, row["labels"], strict=True):
            bins.setdefault(int(10 * chance), []).append((chance, label))
    ece = sum(abs(sum(c for c, _ in found) - sum(y for _, y in found)) for found in bins.values()) / 8
    products = [math.prod(own) for own in expected]
    ordered = [(products[right] > products[wrong]) for right in (0, 3) for wrong in (1, 2)]
    assert figures == pytest.approx(
        {
            "step_accuracy": 6 / 8,
            "first_error": 1 / 2,
            "no_error": 1 / 2,
            "f1": 1 / 2,
            "solution_accuracy": 3 / 4,
            "solution_auc": np.mean(ordered),
            "ece": ece,
        },
        rel=1e-3,
    )
    assert task["figures"]["first_error"]["rows"] == 2 and task["figures"]["step_accuracy"]["rows"] == 4
    assert task["figures"]["solution_accuracy"]["note"] == "product of the steps"
    assert sum(found["count"] for found in task["reliability"]) == 8


@pytest.mark.parametrize("how", ["min", "last"])
def test_solutions_by_another_aggregate(llmtrain: CommandLine, models: dict[str, Path], how: str) -> None:
    write_task(aggregate=how)
    task, records = measured(llmtrain("eval", models["process"], "steps.yaml", *FILES))
    for record, row in zip(records, ROWS, strict=True):
        own = chances(row)
        assert record["score"] == pytest.approx(min(own) if how == "min" else own[-1], rel=1e-3)
    assert task["figures"]["solution_auc"]["note"] == f"{how} of the steps"


def test_scores_are_those_of_transformers(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    _, records = measured(llmtrain("eval", models["random"], "steps.yaml", *FILES, "--batch-tokens", 20))
    hf = AutoModelForTokenClassification.from_pretrained(models["random"])
    for record, row in zip(records, ROWS, strict=True):
        ids = counting.ids_of(whole(row))
        ends = [place for place, number in enumerate(ids) if number == 90]
        with torch.no_grad():
            own = hf(torch.tensor([ids])).logits[0, ends].softmax(1)[:, 1].tolist()
        assert record["step_scores"] == pytest.approx(own, rel=1e-4, abs=1e-5)


def test_answers_of_one_kind_have_figures_of_one_kind(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task(ROWS[0], ROWS[3])
    task, _ = measured(llmtrain("eval", models["process"], "steps.yaml", *FILES))
    assert list(task["figures"]) == ["step_accuracy", "no_error", "solution_accuracy", "ece"]
    write_task(ROWS[1])
    task, _ = measured(llmtrain("eval", models["process"], "steps.yaml", *FILES))
    assert list(task["figures"]) == ["step_accuracy", "first_error", "solution_accuracy", "ece"]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "w3", "chosen": " w4", "rejected": " w5"}, ["where stepwise is expected", "rows.jsonl:1"]),
        ({"prompt": "w3", "completions": [" w4"], "labels": [1]}, ["rows.jsonl:1: labels[0]"]),
        ({"prompt": "w3", "completions": [" w4" * 70], "labels": [True]}, ["window of 64 tokens", "rows.jsonl:1"]),
    ],
)
def test_rows_that_are_wrong(llmtrain: CommandLine, models: dict[str, Path], row: Any, texts: list[str]) -> None:
    write_task(row)
    assert_refused(llmtrain("eval", models["process"], "steps.yaml"), *texts, "remedy")


def test_rows_with_a_step_that_would_be_cut_are_left_out_and_counted(
    llmtrain: CommandLine, models: dict[str, Path]
) -> None:
    cut = {"prompt": "w7", "completions": [" w9 w90 w10", " w11"], "labels": [True, False]}
    write_task()
    plain, _ = measured(llmtrain("eval", models["process"], "steps.yaml", *FILES))
    write_task(ROWS[0], cut, *ROWS[1:])
    done = llmtrain("eval", models["process"], "steps.yaml", *FILES)
    task, records = measured(done)
    assert {name: figure["value"] for name, figure in task["figures"].items()} == pytest.approx(
        {name: figure["value"] for name, figure in plain["figures"].items()}
    )
    assert [record["row"] for record in records] == [0, 2, 3, 4]
    assert (task["left_out"], "left_out" in plain) == (1, False)
    assert "1 of 5 rows left out with steps that the separator cuts, the first rows.jsonl:2" in done.out
    write_task(cut)
    refused = llmtrain("eval", models["process"], "steps.yaml")
    assert_refused(refused, "steps.yaml:1: data", "each of its 1 rows has a step", "' w90' would cut", "remedy")


def test_a_model_of_whole_answers_is_refused(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    done = llmtrain("eval", models["outcome"], "steps.yaml")
    assert_refused(done, "steps.yaml:1: kind", "judges whole answers", "kind: pairs")
