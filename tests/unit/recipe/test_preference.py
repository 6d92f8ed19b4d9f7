"""Recipes of learning from preferences: their default learning rates, and settings that contradict each other."""

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llmtrain.recipe.schema import Recipe
from tests.unit.recipe.minimal import MINIMAL

LORA = {"kind": "lora"}
JUDGED = ("reward_model", "process_reward", "dpo", "kto", "orpo", "simpo")


def recipe(algorithm: dict[str, Any], **overrides: Any) -> Recipe:
    base = yaml.safe_load(MINIMAL) | {
        "model": {"kind": "pretrained", "path": "model"},
        "tokenizer": {"kind": "model"},
        "data": {"train": [{"kind": "jsonl", "paths": ["a.jsonl"]}]},
        "optimizer": {"weight_decay": 0.0},
    }
    base["data"] |= overrides.pop("data", {})
    return Recipe.model_validate(base | {"algorithm": algorithm} | overrides)


@pytest.mark.parametrize(
    ("kind", "full", "lora"),
    [
        ("reward_model", 1e-5, 1e-4),
        ("process_reward", 1e-5, 1e-4),
        ("dpo", 1e-6, 1e-5),
        ("kto", 1e-6, 1e-5),
        ("orpo", 8e-6, 8e-5),
        ("simpo", 1e-6, 1e-5),
    ],
)
def test_default_learning_rates(kind: str, full: float, lora: float) -> None:
    assert recipe({"kind": kind}).peak_lr == full
    assert recipe({"kind": kind}, adapter=LORA).peak_lr == lora
    with pytest.raises(ValidationError, match=f"{kind} with adapter ia3 has no default"):
        recipe({"kind": kind}, adapter={"kind": "ia3"})
    assert recipe({"kind": kind}, adapter={"kind": "ia3"}, optimizer={"lr": 1e-3}).peak_lr == 1e-3


def test_distillation_learns_as_fine_tuning_does() -> None:
    assert recipe({"kind": "distillation", "teacher": {"kind": "pretrained", "path": "teacher"}}).peak_lr == 2e-5


@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": "documents"}, "would cut answers apart"),
        ({"overflow": "split"}, "those that do not fit are left out"),
        ({"train_on": "all"}, "would count prompts"),
    ],
)
def test_answers_are_judged_as_wholes(kind: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe({"kind": kind}, data=data)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_adapter_to_switch_off(kind: str) -> None:
    with pytest.raises(ValidationError, match="needs an adapter to switch off"):
        recipe({"kind": kind, "reference": "adapter_off"})
    recipe({"kind": kind, "reference": "adapter_off"}, adapter=LORA)


@pytest.mark.parametrize("kind", ["reward_model", "process_reward"])
def test_models_that_score_write_no_samples(kind: str) -> None:
    with pytest.raises(ValidationError, match="trains a model that scores and writes none"):
        recipe({"kind": kind}, samples={"prompts": ["a"], "every": 10})


FLASH = {"model": {"kind": "pretrained", "path": "model", "attention": "flash_attention_2"}}
LEARNT = {"adapter": {"kind": "prompt_tuning"}, "optimizer": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        *((kind, FLASH, "takes no mask") for kind in ("reward_model", "dpo", "orpo", "simpo")),
        *((kind, LEARNT, "goes before each document") for kind in ("dpo", "orpo", "simpo")),
    ],
)
def test_prompts_that_cannot_be_shared(kind: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe({"kind": kind}, **overrides)
    assert not recipe({"kind": kind, "share_prompts": False}, **overrides).shares_prompts


@pytest.mark.parametrize("kind", ["reward_model", "process_reward"])
@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_learnt_prompts_have_no_head_that_scores(kind: str, adapter: str) -> None:
    """Said at once, and not after what else they would need: a learning rate, no packing, no shared prompts."""
    with pytest.raises(ValidationError, match=f"{kind} trains a head that scores, too; use adapter lora or ia3"):
        recipe({"kind": kind}, adapter={"kind": adapter})


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("reward_model", "centering"),
        *((kind, "beta") for kind in ("dpo", "kto", "orpo", "simpo")),
        *(("kto", f"{label}_weight") for label in ("desirable", "undesirable")),
        ("simpo", "gamma"),
    ],
)
def test_numbers_that_float32_cannot_reckon_with(kind: str, key: str) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        recipe({"kind": kind, key: 1e300})
    recipe({"kind": kind, key: 100.0})


def test_label_smoothing_is_for_the_sigmoid_loss() -> None:
    assert recipe({"kind": "dpo", "label_smoothing": 0.1}).algorithm.kind == "dpo"
    with pytest.raises(ValidationError, match="label_smoothing is for loss sigmoid, not ipo"):
        recipe({"kind": "dpo", "label_smoothing": 0.1, "loss": "ipo"})
