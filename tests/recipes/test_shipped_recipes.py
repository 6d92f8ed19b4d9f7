"""Every recipe and launch script that ships: valid, short, and of the size that its name says."""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.recipe.batch import plan_batch
from llmtrain.recipe.comparison import load_comparison
from llmtrain.recipe.layout import check_layout, smallest_world
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import ModelFromConfig, SentencePieceTokenizer
from llmtrain.recipe.shipped import comparison_names, find_recipe, launch_directory, recipe_names, recipes_directory

HUB_VOCABULARY = 49_152  # of the hub tokenizer that the shipped recipes use with a config of their own

FROM_CONFIG = [name for name in recipe_names() if isinstance(load_recipe(name).recipe.model, ModelFromConfig)]


def test_names_are_the_files() -> None:
    files = recipes_directory().rglob("*.yaml")
    assert {*recipe_names(), *comparison_names()} == {
        path.relative_to(recipes_directory()).with_suffix("").as_posix() for path in files
    }
    assert recipe_names()[0] == "quickstart"
    assert find_recipe("../pyproject") is None


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name.split("/")[-1]
    assert loaded.recipe.description
    text = loaded.path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert "Worth touching:" in text
    check_layout(loaded.recipe, smallest_world(loaded.recipe))
    for world_size in (1, 2, 8):
        plan_batch(loaded.recipe, world_size)


@pytest.mark.parametrize("name", comparison_names())
def test_comparison_is_valid(name: str, tmp_path: Path) -> None:
    comparison = load_comparison(name)
    assert comparison.description
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(comparison.file.read_bytes())
    again = load_comparison(copy)
    for variant, loaded in comparison.variants.items():
        assert again.variants[variant].recipe == loaded.recipe
        plan_batch(loaded.recipe, 1)


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_means_the_same(name: str, tmp_path: Path) -> None:
    """`recipes copy` takes the file away from what it extends."""
    loaded = load_recipe(name)
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(loaded.path.read_bytes())
    assert load_recipe(copy).recipe == loaded.recipe


@pytest.mark.parametrize("name", FROM_CONFIG)
def test_config_is_one_that_transformers_builds(name: str) -> None:
    """Without memory: the parameters are only counted."""
    recipe = load_recipe(name).recipe
    assert isinstance(recipe.model, ModelFromConfig)
    tokenizer = recipe.tokenizer
    vocabulary = tokenizer.vocab_size if isinstance(tokenizer, SentencePieceTokenizer) else HUB_VOCABULARY
    config = AutoConfig.for_model(recipe.model.architecture, **{"vocab_size": vocabulary, **recipe.model.config})
    assert set(recipe.model.config) <= {*config.to_dict(), *config.attribute_map}, "a field that transformers ignores"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    said = {"quickstart": 1.3, "mixture": 12}.get(recipe.name) or _millions(recipe.name.rpartition("-")[2])
    assert abs(millions - said) < 0.12 * said, f"{millions:.1f}M parameters"


def _millions(size: str) -> float:
    return float(size[:-1]) * {"m": 1, "b": 1000}[size[-1]]


@pytest.mark.parametrize("script", sorted(launch_directory().glob("*.sh")), ids=lambda path: path.name)
def test_launch_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111, "not executable"
    without = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "usage:" in without.stderr
