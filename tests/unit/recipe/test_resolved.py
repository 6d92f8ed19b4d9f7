import json
import subprocess
from pathlib import Path

import pytest

from llmtrain import __version__
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.resolved import (
    EXECUTION_KEYS,
    EXECUTION_SUBKEYS,
    environment,
    identity,
    identity_differences,
    resolved_dump,
)
from llmtrain.recipe.schema import Recipe
from llmtrain.recipe.shipped import recipe_names
from tests.unit.recipe.minimal import Write

EVERYTHING = [
    "ema={decay: 0.99}",
    "samples.prompts=['yes', 'a: b', \"line\\nline\", 'é ✓']",
    "optimizer.clip_norm=null",
    "model.config.rope_parameters={rope_type: yarn, factor: 4.0, big: 1e30}",
    "model.config.limit=[0.0, .inf]",
    "data.validation=[{kind: python}]",
    "description='2024-01-01'",
]


def test_dump_loads_back_equal_and_whole(write: Write) -> None:
    recipe = load_recipe(write(), EVERYTHING).recipe
    text = resolved_dump(recipe)
    again = load_recipe(write(text, "resolved.yaml"))
    assert again.recipe == recipe
    assert set(again.tree.value) == set(Recipe.model_fields)
    assert "max_skipped_steps: 10" in text


@pytest.mark.parametrize("name", recipe_names())
def test_dump_of_shipped_recipes(write: Write, name: str) -> None:
    recipe = load_recipe(name).recipe
    assert load_recipe(write(resolved_dump(recipe))).recipe == recipe


def test_identity_leaves_out_how_a_run_is_carried_out(write: Write) -> None:
    old = identity(load_recipe(write()).recipe)
    assert not [key for key in old if key.split(".")[0] in EXECUTION_KEYS or key in EXECUTION_SUBKEYS]
    assert old["data.train.0.paths.0"] == "a.txt"
    assert json.loads(json.dumps(old)) == old
    other = [
        "description=x",
        "output_dir=elsewhere",
        "device=cpu",
        "engine={kind: ddp, compile: true}",
        "samples={prompts: [a]}",
        "early_stopping={patience: 2}",
        "evaluation.every=3",
        "checkpoint.keep=9",
        "watchdog.data=9",
        "logging.tensorboard=false",
        "batch.micro_sequences=1",
        "data.cache_dir=x",
    ]
    assert {entry.partition("=")[0].split(".")[0] for entry in other} >= EXECUTION_KEYS, "a new key needs a case"
    assert identity(load_recipe(write(), other).recipe) == old


def test_identity_differences(write: Write) -> None:
    def of(*overrides: str) -> dict[str, object]:
        return identity(load_recipe(write(), overrides).recipe)

    assert identity_differences(of(), of()) == []
    assert identity_differences(of(), of("optimizer.lr=1e-4", "seed=1")) == [
        ("seed", 0, 1),
        ("optimizer.lr", 1e-3, 1e-4),
    ]
    added = identity_differences(of(), of("data.train.0.paths=[a.txt, b.txt]", "model.config.head_dim=8"))
    assert added == [("model.config.head_dim", None, 8), ("data.train.0.paths.1", None, "b.txt")]
    assert ("schedule.kind", "cosine", "constant") in identity_differences(of(), of("schedule.kind=constant"))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["llmtrain"] == __version__
    assert found["packages"]["torch"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["git"] is None

    def git(*arguments: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *settings, *arguments], check=True, capture_output=True)

    git("init")
    assert environment()["git"] is None  # no commit yet
    (tmp_path / "file").write_text("a", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "first")
    clean = environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("b", encoding="utf-8")
    assert environment()["git"] == {"commit": clean["commit"], "dirty": True}


def test_a_tilde_in_output_dir_is_the_home_directory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load_recipe(write(), ["output_dir=~/runs"]).recipe
    assert str(recipe.run_directory) == f"/home/somebody/runs/{recipe.name}"
