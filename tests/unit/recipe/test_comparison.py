"""Comparisons: a recipe with variants, checked whole, each mistake with its place."""

from pathlib import Path

import pytest

from llmtrain.recipe.comparison import is_comparison, load_comparison
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.problems import RecipeError
from tests.unit.recipe.minimal import MINIMAL

VARIANTS = """\
variants:
  ar:
  masked:
    algorithm: {kind: masked_diffusion}
  adapted:
    start_from: ar
    algorithm: {kind: masked_diffusion, shift: true}
    steps: 50
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "comparison.yaml"
    path.write_text(MINIMAL + text, encoding="utf-8")
    return path


def test_variants_lie_over_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, VARIANTS + "compare: {documents: 7}\n")
    assert is_comparison(path)
    comparison = load_comparison(path, ["optimizer.lr=0.5", "output_dir=elsewhere"])
    recipes = {name: loaded.recipe for name, loaded in comparison.variants.items()}
    assert list(recipes) == ["ar", "masked", "adapted"]
    assert comparison.name == "minimal" and comparison.directory == Path("elsewhere/minimal")
    assert comparison.measurement.documents == 7
    assert {str(recipe.run_directory) for recipe in recipes.values()} == {f"elsewhere/minimal/{n}" for n in recipes}
    assert {recipe.optimizer.lr for recipe in recipes.values()} == {0.5}
    assert [recipe.algorithm.kind for recipe in recipes.values()] == ["causal_lm", *["masked_diffusion"] * 2]
    assert [recipe.steps for recipe in recipes.values()] == [100, 100, 50]
    assert comparison.start_from == {"adapted": "ar"}
    model = recipes["adapted"].model
    assert model.kind == "pretrained" and model.path == "elsewhere/minimal/ar/final"
    assert recipes["adapted"].tokenizer.kind == "model"
    assert recipes["ar"].model.kind == "config"


def test_settings_of_the_comparison_itself(tmp_path: Path) -> None:
    path = write(tmp_path, VARIANTS + "compare: {documents: 7}\n")
    comparison = load_comparison(path, ["compare.documents=3", "variants.ar.steps=5", "steps=20", "variants.more=null"])
    assert comparison.measurement.documents == 3
    assert {name: loaded.recipe.steps for name, loaded in comparison.variants.items()} == {
        "ar": 20,
        "masked": 20,
        "adapted": 20,
        "more": 20,
    }
    assert load_comparison(path, ["variants.ar.steps=50"]).variants["ar"].recipe.steps == 50
    with pytest.raises(RecipeError, match=r"override 'compare.documents=0': documents: must be greater than 0"):
        load_comparison(path, ["compare.documents=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no variants: train it with `llmtrain train`"),
        ("variants: []\n", "16: variants is a mapping of names to what each changes"),
        ("variants: {}\n", "16: variants is a mapping of names"),
        ("variants:\n  a: 3\n", "17: variants.a is a mapping of what it changes"),
        ("variants:\n  a: {step: 3}\n", "17: step: unknown key"),
        ("variants:\n  a: {start_from: b}\n  b:\n", "17: start_from: 'b' is no variant above it (there is none)"),
        ("variants:\n  a:\n  b: {start_from: b}\n", "18: start_from: 'b' is no variant above it (a)"),
        ("variants:\n  a:\ncompare: {document: 3}\n", "18: document: unknown key"),
        ("variants:\n  a/b:\n", "name"),
        ("variants:\n  a: {name: b}\n", "17: name is the comparison's"),
        ("variants:\n  a:\n  b: {output_dir: b}\n", "18: output_dir is the comparison's"),
        ("variants:\n  a:\n  b: {data: {validation_fraction: 0}}\n", "18: variants.b holds out no texts to measure on"),
        ("variants:\n  a:\n  b: {data: {validation_fraction: 0.2}}\n", "18: variants.b holds out other texts than"),
        (
            "variants:\n  a: {algorithm: {kind: sft}}\n",
            "17: variants.a trains on examples, and a comparison measures texts",
        ),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_comparison(write(tmp_path, text))
    assert message in str(caught.value), str(caught.value)


def test_a_mistake_that_all_variants_have_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_comparison(write(tmp_path, VARIANTS), ["optimizer.learning=1"])
    assert len(caught.value.problems) == 1


def test_training_a_comparison_says_how_it_is_run(tmp_path: Path) -> None:
    path = write(tmp_path, VARIANTS)
    with pytest.raises(RecipeError, match=r"it has variants: run it with `llmtrain compare "):
        load_recipe(path)
    assert not is_comparison(write(tmp_path, ""))
