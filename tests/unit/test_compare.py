"""`llmtrain compare` from its recipe to its table, on tiny models."""

import json
from pathlib import Path

import pytest
import yaml

from llmtrain.compare import compare, train_variant
from llmtrain.errors import InputError
from llmtrain.recipe.comparison import LoadedComparison, load_comparison
from tests.runs import write_recipe

VARIANTS = {
    "ar": {},
    "masked": {"algorithm": {"kind": "masked_diffusion"}},
    "block-from-ar": {"start_from": "ar", "algorithm": {"kind": "block_diffusion", "block_size": 4, "shift": True}},
}


@pytest.fixture
def comparison(tmp_path: Path) -> LoadedComparison:
    recipe = write_recipe(
        tmp_path, evaluation={"every": 6, "max_sequences": 4}, variants=VARIANTS, compare={"documents": 6}
    )
    return load_comparison(recipe)


def test_all_are_trained_and_measured_once(comparison: LoadedComparison, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(comparison) == 0
    shown = capsys.readouterr().out
    rows = json.loads((comparison.directory / "comparison.json").read_text())["variants"]
    assert set(rows) == set(VARIANTS)
    for name, row in rows.items():
        assert name in shown
        assert row["tokens"] > 0 and row["seconds"] > 0
        bits = row["figures"]["bits_per_byte"]
        assert 0 < bits["value"] < 3 and bits["stderr"] > 0
    least = min(row["figures"]["bits_per_byte"]["value"] for row in rows.values())
    for row in rows.values():  # of the same documents, so that they differ by less than documents do
        assert row["to_best"]["value"] == pytest.approx(row["figures"]["bits_per_byte"]["value"] - least)
        assert row["to_best"]["stderr"] < row["figures"]["bits_per_byte"]["stderr"]
    assert rows["block-from-ar"]["start_from"] == "ar"
    # the weights that it started from are the other's
    assert rows["block-from-ar"]["figures"]["loss"]["value"] < rows["masked"]["figures"]["loss"]["value"]
    written = {path: path.stat().st_mtime_ns for path in comparison.directory.rglob("measured.json")}
    assert len(written) == len(VARIANTS)
    assert compare(comparison) == 0
    assert capsys.readouterr().out == shown
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_one_variant_alone(comparison: LoadedComparison) -> None:
    with pytest.raises(InputError, match="block-from-ar starts from ar, which is not finished"):
        train_variant(comparison, "block-from-ar")
    with pytest.raises(InputError, match="there is no variant 'nothing'"):
        train_variant(comparison, "nothing")
    assert train_variant(comparison, "masked") == 0
    assert (comparison.directory / "masked" / "final" / "diffusion.json").is_file()
    assert yaml.safe_load((comparison.directory / "masked" / "recipe.resolved.yaml").read_text())["name"] == "masked"


def test_paths_of_texts_are_those_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, wherever the comparison lies."""
    (tmp_path / "comparisons").mkdir()
    write_recipe(tmp_path / "comparisons", steps=2, variants={"ar": {}}, compare={"documents": 2})
    (tmp_path / "comparisons" / "corpus.txt").rename(tmp_path / "corpus.txt")
    monkeypatch.chdir(tmp_path)
    texts = 'data.train=[{"kind": "text", "paths": ["corpus.txt"], "document": "line"}]'
    assert compare(load_comparison("comparisons/recipe.yaml", [texts])) == 0


def test_ranks_train_single_variants_only(comparison: LoadedComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"run by one process, and there are 2(.|\n)*--variant NAME under torchrun"):
        compare(comparison)
    assert not comparison.directory.exists()
