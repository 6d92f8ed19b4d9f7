"""Log-probabilities under the reference: kept with the run, read when it goes on, and by no other run."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmtrain.algorithms.reference import FILE
from llmtrain.errors import InputError
from llmtrain.observe.metrics import read_metrics
from tests.chats import write_jsonl
from tests.judged import judged_recipe, preferences
from tests.runs import train_here


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its run."""
    directory = tmp_path_factory.mktemp("reference")
    recipe = directory / "dpo.yaml"
    recipe.write_text(yaml.safe_dump(judged_recipe(directory, "dpo")))
    return recipe, train_here(recipe, f"output_dir={directory / 'runs'}")


def stopped(run: Path, directory: Path) -> Path:
    """A copy of the run as it was before its last steps."""
    copy = directory / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    return copy


def test_it_is_read_when_the_run_goes_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = whole
    copy = stopped(run, tmp_path)
    kept = load_file(copy / FILE)
    shifted = {name: values + torch.arange(len(values)) % 2 * 5 for name, values in kept.items()}
    fingerprint = metadata(copy / FILE)
    save_file(shifted, copy / FILE, fingerprint)
    resumed = train_here(recipe, f"output_dir={tmp_path}")
    losses = [list(read_metrics(path / "metrics.jsonl"))[-1]["eval_loss"] for path in (run, resumed)]
    assert losses[0] != losses[1]
    assert all(torch.equal(values, shifted[name]) for name, values in load_file(copy / FILE).items())


def metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_of_other_data_it_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = whole
    copy = stopped(run, tmp_path)
    data = recipe.parent / "preferences.jsonl"
    before = data.read_text()
    try:
        write_jsonl(data, preferences(60, seed=1))
        with pytest.raises(InputError, match="the data changed") as caught:
            train_here(recipe, f"output_dir={tmp_path}")
    finally:
        data.write_text(before)
    assert caught.value.where == str(copy / FILE)


def test_a_damaged_one_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = whole
    copy = stopped(run, tmp_path)
    with (copy / FILE).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="cannot be read") as caught:
        train_here(recipe, f"output_dir={tmp_path}")
    assert caught.value.where == str(copy / FILE)


def test_that_of_a_run_which_never_trained_is_computed_anew(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = whole
    killed = tmp_path / run.name
    killed.mkdir()
    kept = load_file(run / FILE)
    of_another_model = {name: values - 5 for name, values in kept.items()}
    save_file(of_another_model, killed / FILE, metadata(run / FILE))
    train_here(recipe, f"output_dir={tmp_path}")
    assert all(torch.equal(values, kept[name]) for name, values in load_file(killed / FILE).items())
