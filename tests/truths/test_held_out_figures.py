"""A run's held-out figures and those of `llmtrain eval` are of one quantity, on the same texts, for every algorithm."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.evaluation import perplexity
from llmtrain.evaluation.tasks import LoadedTask, Perplexity
from llmtrain.models.saved import load_saved
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema.figures import held_out_figures
from tests import judged
from tests.chats import sft_recipe
from tests.distilling import TEACHER
from tests.runs import train_here, write_recipe

SAMPLES = 4
ALGORITHMS: dict[str, dict[str, Any]] = {
    "autoregressive": {"kind": "causal_lm"},
    "blocks of 1": {"kind": "block_diffusion", "block_size": 1},
    "blocks of 1, shifted": {"kind": "block_diffusion", "block_size": 1, "shift": True},
    "blocks of 4": {"kind": "block_diffusion", "block_size": 4},
    "masked": {"kind": "masked_diffusion"},
    "masked, shifted": {"kind": "masked_diffusion", "shift": True},
    "uniform": {"kind": "score_entropy", "noise": "uniform"},
}


def names(record: dict[str, Any]) -> set[str]:
    return {name.removeprefix("eval_") for name in record if name.startswith("eval_")}


@pytest.mark.parametrize("name", [*judged.ALGORITHMS, "distillation", "block_diffusion"])
def test_a_run_has_the_figures_that_recipes_may_name(name: str, tmp_path: Path) -> None:
    """Of the other algorithms the next test looks at them."""
    match name:
        case "distillation":
            recipe = sft_recipe(tmp_path, algorithm={"kind": name, "teacher": TEACHER})
        case "block_diffusion":
            algorithm = {"kind": name, "task": "sft", "block_size": 4, "clip": "search"}
            recipe = sft_recipe(tmp_path, algorithm=algorithm)
        case _:
            recipe = judged.judged_recipe(tmp_path, name)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"steps": 1, "schedule": {"kind": "constant"}}))
    first, *_ = read_metrics(train_here(file) / "metrics.jsonl")
    assert names(first) == set(held_out_figures(load_recipe(file).recipe.algorithm))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_and_an_evaluation_measure_the_same(name: str, tmp_path: Path) -> None:
    """Each document is a row, so that both count the same tokens; exact figures are equal, bounds but for noise."""
    recipe = write_recipe(
        tmp_path,
        algorithm=ALGORITHMS[name],
        sequence_length=64,
        data={"packing": "none", "validation_fraction": 0.3},
        evaluation={"every": 6, "max_sequences": 1000},
    )
    run = train_here(recipe)
    ours = [record for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record][-1]
    loaded = load_recipe(recipe)
    assert names(ours) == set(held_out_figures(loaded.recipe.algorithm))
    task = Perplexity(
        kind="perplexity",
        data=loaded.recipe.data.train,
        held_out_fraction=0.3,
        sequence_length=64,
        samples=SAMPLES,
        end_of_text=True,
    )
    theirs, rows = perplexity.measure(
        LoadedTask(task, loaded.path, loaded.tree), task, load_saved(str(run)), None, 8192
    )
    assert len(rows) > 50
    noise = theirs.get("monte_carlo_error")
    assert (noise is None) == name.startswith(("autoregressive", "blocks of 1"))
    # Of one draw a text in the run, and of SAMPLES in the evaluation.
    error = 0.0 if noise is None else 5 * noise.value * math.sqrt(SAMPLES + 1)
    assert ours["eval_loss"] == pytest.approx(theirs["loss"].value, rel=1e-5, abs=error)
    per_byte = theirs["bits_per_byte"].value / theirs["loss"].value
    assert ours["eval_bits_per_byte"] == pytest.approx(per_byte * ours["eval_loss"], rel=1e-5)
