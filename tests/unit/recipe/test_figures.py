"""Held-out figures that end a run, or choose its best checkpoint: which there are, and which way is better."""

from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.recipe.introspect import kinds
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.resolved import resolved_dump
from llmtrain.recipe.schema import Recipe
from llmtrain.recipe.schema.around import WatchedFigure
from llmtrain.recipe.schema.figures import held_out_figures
from tests.unit.recipe.minimal import Write
from tests.unit.recipe.test_preference import recipe

EXAMPLES: dict[str, dict[str, Any]] = {
    "block_diffusion": {"block_size": 4},
    "distillation": {"teacher": {"kind": "pretrained", "path": "teacher"}},
}
PLACES = ("early_stopping", "checkpoint.keep_best")


def watched(place: str, figure: dict[str, Any], algorithm: dict[str, Any], **overrides: Any) -> WatchedFigure:
    """The figure, of a recipe that watches it there."""
    section = {"early_stopping": figure} if place == "early_stopping" else {"checkpoint": {"keep_best": figure}}
    made = recipe(algorithm, **section, **overrides)
    found = made.early_stopping or made.checkpoint.keep_best
    assert found is not None
    return found


@pytest.mark.parametrize("kind", kinds(Recipe.model_fields["algorithm"].annotation))
def test_every_algorithm_has_a_loss(kind: str) -> None:
    made = recipe({"kind": kind} | EXAMPLES.get(kind, {}), optimizer={"lr": 1e-3})
    assert "loss" in held_out_figures(made.algorithm)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("metric", "better"), [("loss", "min"), ("ece", "min"), ("accuracy", "max"), ("margin", "max")]
)
def test_the_mode_of_known_figures_need_not_be_said(place: str, metric: str, better: str) -> None:
    assert watched(place, {"metric": metric}, {"kind": "reward_model"}).better == better
    assert watched(place, {"metric": metric, "mode": better}, {"kind": "reward_model"}).better == better


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_others_have_the_mode_that_is_said(place: str, mode: str) -> None:
    assert watched(place, {"metric": "logprob_better", "mode": mode}, {"kind": "dpo"}).better == mode


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"metric": "accuracy", "mode": "min"}, "mode min would take the worst for the best: more accuracy is better"),
        ({"metric": "loss", "mode": "max"}, "mode max would take the worst for the best: less loss is better"),
        ({"metric": "score_mean"}, "metric score_mean: it is not known whether less or more of it is better"),
        ({"metric": "perplexity"}, "metric 'perplexity' is no held-out figure of reward_model; there are: loss, acc"),
        ({"metric": "eval_accuracy"}, "metric 'eval_accuracy' is no .* of reward_model; did you mean 'accuracy'"),
    ],
)
def test_figures_that_would_choose_the_wrong_one(place: str, figure: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"{place}.{message}"):
        watched(place, figure, {"kind": "reward_model"})


def test_a_range_of_rates_is_a_figure_where_it_is_searched() -> None:
    figure, block = {"metric": "clip_low", "mode": "max"}, {"kind": "block_diffusion", "block_size": 4}
    watched("early_stopping", figure, block | {"clip": "search"}, optimizer={"lr": 1e-3})
    with pytest.raises(ValidationError, match="'clip_low' is no held-out figure of block_diffusion"):
        watched("early_stopping", figure, block, optimizer={"lr": 1e-3})


@pytest.mark.parametrize("place", PLACES)
def test_without_held_out_rows_there_are_no_figures(place: str) -> None:
    with pytest.raises(ValidationError, match=f"{place} looks at held-out rows, and there are none"):
        watched(place, {}, {"kind": "reward_model"}, data={"validation_fraction": 0.0})


def test_a_resolved_recipe_loads_back(write: Write) -> None:
    made = load_recipe(write(), ["early_stopping={}", "checkpoint.keep_best={metric: bits_per_byte}"]).recipe
    assert load_recipe(write(resolved_dump(made))).recipe == made
