from pathlib import Path

from llmtrain.recipe.introspect import dotted_keys
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.reference import EXAMPLE, reference
from llmtrain.recipe.schema import Recipe
from tests.unit.recipe.minimal import Write

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipe.md"


def test_the_page_is_fresh() -> None:
    remedy = "run: python -m llmtrain.recipe.reference > docs/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), remedy


def test_every_key_is_in_it() -> None:
    text = reference()
    for key in dotted_keys(Recipe):
        # These point at data.train and at model.
        if not key.startswith(("data.validation.<index>", "algorithm.teacher.")):
            assert f"| `{key}` |" in text


def test_every_row_has_four_cells_and_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    for row in rows:
        cells = row.replace("\\|", "").strip("|").split(" | ")
        assert len(cells) == 4, row
        assert all(cell.strip() for cell in cells), row


def test_the_example_is_valid(write: Write) -> None:
    assert load_recipe(write(EXAMPLE)).recipe.name == "first-run"
