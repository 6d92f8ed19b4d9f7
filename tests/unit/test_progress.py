"""Early stopping: when it strikes, and the run that it ends. Skipped steps are in test_loop.py."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmtrain.errors import InputError
from llmtrain.progress import Progress
from llmtrain.recipe.schema import EarlyStopping
from tests.runs import final_weights, train_here, training_state, write_recipe


@pytest.mark.parametrize(
    ("mode", "figures", "stale"),
    [
        ("min", [3.0, 2.0, 1.0], 0),
        ("min", [3.0, 3.0, 3.0], 2),
        ("min", [3.0, 2.0, 2.5, math.nan], 2),
        ("min", [3.0, 2.95], 1),  # less than min_delta
        ("max", [0.1, 0.5, 0.4], 1),
        ("max", [0.5, 0.1, 0.9], 0),
        (None, [3.0, 2.0, 1.0], 0),  # of a loss less is better
        ("min", [math.nan, 1.0], 0),
    ],
)
def test_evaluations_without_an_improvement(mode: str | None, figures: list[float], stale: int) -> None:
    spec = EarlyStopping.model_validate({"mode": mode, "patience": 3, "min_delta": 0.1})
    progress = Progress()
    for figure in figures:
        progress.judge(spec, {"loss": figure})
    assert progress.stale_evaluations == stale
    assert not progress.exhausted(spec)
    progress.judge(spec, {"loss": math.nan})
    progress.judge(spec, {"loss": math.nan})
    progress.judge(spec, {"loss": math.nan})
    assert progress.exhausted(spec)


def test_a_figure_that_is_not_there() -> None:
    with pytest.raises(InputError, match="early_stopping.metric: no held-out figure 'accuracy'; there are: loss"):
        Progress().judge(EarlyStopping(metric="accuracy"), {"loss": 1.0})


def test_a_run_that_no_longer_improves_is_done_and_exports_its_best(tmp_path: Path) -> None:
    """A learning rate that destroys the model: the first evaluations are the best."""
    recipe = write_recipe(
        tmp_path,
        steps=40,
        optimizer={"lr": 1e-2, "eps": 1e-5},
        schedule={"kind": "constant"},
        evaluation={"every": 2, "max_sequences": 8},
        checkpoint={"every": 2, "keep": 1, "keep_best": {}, "export": "best"},
        early_stopping={"patience": 2, "min_delta": 1.0},
    )
    run = train_here(recipe)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = steps[-1]["step"]
    assert last < 40
    losses = {record["step"]: record["eval_loss"] for record in steps if "eval_loss" in record}
    best = min((step for step in losses if step), key=losses.__getitem__)
    saved = training_state(run, best)
    for name, weight in final_weights(run).items():
        assert torch.equal(weight.flatten(), saved[f"policy/model.hf.{name}"]), name
    assert train_here(recipe) == run  # it is finished, and says so
