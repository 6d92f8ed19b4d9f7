"""Reward models on answers that were compared, as a user measures them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests import counting, scorers
from tests.chats import write_chat_model
from tests.saved import CommandLine, Done, assert_refused, write_model

ROWS: list[dict[str, Any]] = [
    {"prompt": "w7 w8", "chosen": " w50 w9", "rejected": " w10 w9"},  # right
    {"prompt": "w7", "chosen": " w9 w10", "rejected": " w50 w9"},  # wrong
    {"prompt": "w50", "chosen": " w9 w10", "rejected": " w11 w12"},  # a tie
    {"chosen": "w50 w50 w9", "rejected": "w50 w10 w9"},  # right, without a prompt
    {"prompt": "w20 w21 w22", "chosen": " w50", "rejected": " w50 w60 w61 w62 w63"},  # right
]
FIGURES = ["accuracy", "margin", "score_best", "score_other", "score_std", "ece"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "outcome": counting.write(base / "outcome", "outcome", slope=0.5),
        "process": counting.write(base / "process", "process", slope=-1.0, offset=2.0),
        "random": scorers.write(base / "random", "outcome"),
        "causal": write_model(base / "causal"),
    }


def write_task(*rows: Any, file: str = "pairs.yaml", **settings: Any) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    Path(file).write_text(json.dumps({"kind": "pairs", "data": "rows.jsonl"} | settings))


def measured(done: Done) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The task's part of --output, and the rows of --samples."""
    assert done.code == 0, done.err
    written = json.loads(Path("out.json").read_text())
    records = [json.loads(line) for line in Path("rows.out").read_text().splitlines()]
    return written["tasks"]["pairs"], records


FILES = ("--output", "out.json", "--samples", "rows.out")


def answers_of(row: dict[str, Any]) -> list[str]:
    return [row.get("prompt", "") + row[name] for name in ("chosen", "rejected")]


def test_figures_by_hand(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    done = llmtrain("eval", models["outcome"], "pairs.yaml", *FILES)
    task, records = measured(done)
    scores = [[0.5 * counting.seen(counting.ids_of(text)) for text in answers_of(row)] for row in ROWS]
    for record, own, row in zip(records, scores, ROWS, strict=True):
        assert record["scores"] == pytest.approx(own, rel=1e-4, abs=1e-5)
        assert (record["ranks"], record["prompt"]) == ([1, 2], row.get("prompt"))
        assert record["answers"] == [row["chosen"], row["rejected"]]
    assert records[2]["scores"][0] == records[2]["scores"][1]
    right = [1, 0, 0.5, 1, 1]
    margins = [better - other for better, other in scores]
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin, outcome in zip(margins, right, strict=True):
        confidence = counting.sigmoid(abs(margin))
        bins.setdefault(int((confidence - 0.5) / 0.05), []).append((confidence, outcome))
    ece = sum(abs(sum(c for c, _ in found) - sum(o for _, o in found)) for found in bins.values()) / len(ROWS)
    expected = {
        "accuracy": np.mean(right),
        "margin": np.mean(margins),
        "score_best": np.mean([better for better, _ in scores]),
        "score_other": np.mean([other for _, other in scores]),
        "score_std": np.std(scores, ddof=1),
        "ece": ece,
    }
    assert list(task["figures"]) == FIGURES
    assert {name: figure["value"] for name, figure in task["figures"].items()} == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )
    assert task["figures"]["accuracy"]["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    assert task["figures"]["accuracy"]["note"] == "95 % from 0.299 to 0.927"
    assert {figure["rows"] for figure in task["figures"].values()} == {5}
    quantiles = np.percentile([score for pair in scores for score in pair], [5, 25, 50, 75, 95])
    assert list(task["score_quantiles"]) == ["5", "25", "50", "75", "95"]
    assert list(task["score_quantiles"].values()) == pytest.approx(quantiles.tolist(), rel=1e-4, abs=1e-5)
    assert sum(found["count"] for found in task["reliability"]) == 5
    summary = json.loads(Path("out.json").read_text())
    assert summary["reward"] == {"kind": "outcome", "bias": 0.0, "separator": None}
    assert done.out.splitlines()[0].split("\t") == ["task", "figure", "value", "stderr", "rows", "note"]
    assert [line.split("\t")[1] for line in done.out.splitlines()[1:]] == FIGURES


def test_scores_are_those_of_transformers(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    _, records = measured(llmtrain("eval", models["random"], "pairs.yaml", *FILES, "--batch-tokens", 16))
    hf = AutoModelForSequenceClassification.from_pretrained(models["random"])
    for record, row in zip(records, ROWS, strict=True):
        with torch.no_grad():
            own = [float(hf(torch.tensor([counting.ids_of(text)])).logits[0, 0]) for text in answers_of(row)]
        assert record["scores"] == pytest.approx(own, rel=1e-4, abs=1e-5)


def test_conversations(llmtrain: CommandLine, tmp_path: Path) -> None:
    """Through the reward model's own template; without a prompt the answers are whole conversations."""
    tokenizer = write_chat_model(tmp_path / "chat")
    scorers.model("outcome", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "chat")
    asked = [{"role": "user", "content": "the quick"}]
    answers = [{"role": "assistant", "content": text} for text in ("brown fox", "lazy dog")]
    write_task(
        {"prompt": asked, "chosen": answers[:1], "rejected": answers[1:]},
        {"chosen": [*asked, answers[0]], "rejected": [*asked, answers[1]]},
    )
    _, records = measured(llmtrain("eval", tmp_path / "chat", "pairs.yaml", *FILES))
    hf = AutoModelForSequenceClassification.from_pretrained(tmp_path / "chat")
    texts = [tokenizer.apply_chat_template([*asked, answer], return_dict=False) for answer in answers]
    with torch.no_grad():
        own = [float(hf(torch.tensor([ids])).logits[0, 0]) for ids in texts]
    assert own[0] != pytest.approx(own[1])
    for record in records:
        assert record["scores"] == pytest.approx(own, rel=1e-4, abs=1e-5)


def test_ranked_answers_weigh_as_one_row(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    """Of three answers with ranks 1, 2, 2 two pairs count; of four with ranks of their own all six."""
    write_task(
        {"prompt": "w7", "completions": [" w9", " w50", " w50 w9 w9"], "ranks": [2, 1, 2]},
        {"prompt": "w7", "completions": [" w50", " w9", " w50 w9", " w50 w50"], "ranks": [1, 2, 3, 4]},
    )
    task, records = measured(llmtrain("eval", models["outcome"], "pairs.yaml", *FILES))
    # second row: by share the order is 4, 1, 3, 2; of the pairs (1,2) and (1,3) are right
    assert [record["ranks"] for record in records] == [[2, 1, 2], [1, 2, 3, 4]]
    assert task["figures"]["accuracy"]["value"] == pytest.approx((1 + 2 / 6) / 2)
    assert task["figures"]["accuracy"]["rows"] == 2
    first, second = (record["scores"] for record in records)
    best, others = (first[1] + second[0]) / 2, ((first[0] + first[2]) / 2 + sum(second[1:]) / 3) / 2
    assert task["figures"]["score_best"]["value"] == pytest.approx(best)
    assert task["figures"]["score_other"]["value"] == pytest.approx(others)
    assert sum(found["weight"] for found in task["reliability"]) == pytest.approx(2)
    assert sum(found["count"] for found in task["reliability"]) == 8


def test_rows_with_an_answer_twice_are_left_out_and_counted(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    twice: list[dict[str, Any]] = [
        {"prompt": "w7", "chosen": " w9 w10", "rejected": " w9 w10 "},
        {"prompt": "w7", "chosen": " w9 w10", "rejected": " w9  w10"},  # the same tokens
    ]
    write_task()
    plain, _ = measured(llmtrain("eval", models["outcome"], "pairs.yaml", *FILES))
    write_task(ROWS[0], *twice, *ROWS[1:])
    done = llmtrain("eval", models["outcome"], "pairs.yaml", *FILES)
    task, records = measured(done)
    assert {name: figure["value"] for name, figure in task["figures"].items()} == pytest.approx(
        {name: figure["value"] for name, figure in plain["figures"].items()}
    )
    assert [record["row"] for record in records] == [0, 3, 4, 5, 6]
    assert (task["left_out"], "left_out" in plain) == (2, False)
    assert "2 of 7 rows left out with an answer twice, the first rows.jsonl:2" in done.out
    write_task(*twice)
    refused = llmtrain("eval", models["outcome"], "pairs.yaml")
    assert_refused(refused, "pairs.yaml:1: data", "in each of its 2 rows two answers are the same", "remedy")
    write_task(*({"prompt": "w7", "completions": [" w9", " w50", last], "ranks": [1, 2, 3]} for last in (" w9", " w8")))
    task, records = measured(llmtrain("eval", models["outcome"], "pairs.yaml", *FILES))
    assert [record["row"] for record in records] == [1] and task["left_out"] == 1


@pytest.mark.parametrize("how", [None, "product", "min", "last"])
def test_a_process_model_scores_by_its_steps(llmtrain: CommandLine, models: dict[str, Path], how: str | None) -> None:
    rows = [{"prompt": "w7", "chosen": " w9 w90 w10", "rejected": " w50 w50 w90 w9 w9 w9 w9"}]
    write_task(*rows, **({} if how is None else {"aggregate": how}))
    task, records = measured(llmtrain("eval", models["process"], "pairs.yaml", *FILES))
    steps = [[counting.sigmoid(2 - x) for x in counting.steps_seen(f"{text} w90")] for text in answers_of(rows[0])]
    assert steps[1][0] < steps[1][1] < steps[0][0]
    expected: Any = {"min": min, "last": lambda found: found[-1]}.get(how or "", math.prod)
    assert records[0]["scores"] == pytest.approx([expected(found) for found in steps], rel=1e-4, abs=1e-5)
    for found, own in zip(records[0]["step_scores"], steps, strict=True):
        assert found == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert list(task["figures"]) == FIGURES[:-1] and "reliability" not in task
    assert f"{how or 'product'} of the steps" in task["figures"]["accuracy"]["note"]


def test_only_so_many_rows(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    task, records = measured(llmtrain("eval", models["outcome"], "pairs.yaml", *FILES, "--limit", 2))
    assert len(records) == 2 and task["figures"]["accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"text": "w3"}, ["a task of kind pairs compares answers", "rows.jsonl:1", "pairs.yaml:1: data"]),
        ({"prompt": "w3", "chosen": " w4"}, ["rows.jsonl:1"]),
        ({"prompt": "w3", "chosen": " w4", "rejected": " "}, ["rows.jsonl:1: rejected is empty"]),
        ({"prompt": "w3", "completions": [" w4", " w5"], "ranks": [1, 1]}, ["have one rank", "rows.jsonl:1"]),
        (
            {"prompt": "w3", "chosen": " w4" * 80, "rejected": " w5"},
            ["1 of 2 answers with their prompts do not fit", "window of 64 tokens; this one has 83", "rows.jsonl:1"],
        ),
        ({"chosen": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}, ["rows.jsonl:1"]),
    ],
)
def test_rows_that_are_wrong(llmtrain: CommandLine, models: dict[str, Path], row: Any, texts: list[str]) -> None:
    write_task(row)
    assert_refused(llmtrain("eval", models["outcome"], "pairs.yaml"), *texts, "remedy")


def test_models_and_tasks_that_do_not_go_together(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    Path("text.txt").write_text("w3 w4 w5")
    perplexity = {"kind": "perplexity", "data": [{"kind": "text", "paths": ["text.txt"]}]}
    Path("likely.yaml").write_text(json.dumps(perplexity))
    assert_refused(llmtrain("eval", models["causal"], "pairs.yaml"), "a causal language model", "gives no score")
    assert_refused(llmtrain("eval", models["outcome"], "likely.yaml"), "a causal language model is wanted")
    done = llmtrain("eval", models["outcome"], "likely.yaml", "pairs.yaml")
    assert_refused(done, "pairs (kind pairs) is for reward models", "likely (kind perplexity) for language models")
    write_task(aggregate="min")
    assert_refused(llmtrain("eval", models["outcome"], "pairs.yaml"), "pairs.yaml:1: aggregate", "judges whole answers")
    write_task(aggregate="mean")
    assert_refused(llmtrain("eval", models["process"], "pairs.yaml"), "pairs.yaml:1", "aggregate")
    write_task(data="no.jsonl")
    assert_refused(llmtrain("eval", models["outcome"], "pairs.yaml"), "no.jsonl")
    Path("no.jsonl").write_text("\n")
    assert_refused(llmtrain("eval", models["outcome"], "pairs.yaml"), "no.jsonl has no rows", "pairs.yaml:1: data")
