"""Log-probabilities under the reference: kept with the run, read when it goes on, and by no other run."""

import logging
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


def begun(run: Path, directory: Path) -> Path:
    """A copy of the run as it was before its first checkpoint."""
    copy = stopped(run, directory)
    shutil.rmtree(copy / "checkpoints")
    return copy


def retrained(model: Path) -> None:
    """Other weights in the same place."""
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})


def shift(file: Path) -> dict[str, torch.Tensor]:
    """Makes those that are kept others, which show whether they are read."""
    shifted = {name: values + 1 for name, values in load_file(file).items()}
    save_file(shifted, file, metadata(file))
    return shifted


def is_kept(file: Path, values: dict[str, torch.Tensor]) -> bool:
    found = load_file(file)
    return all(torch.equal(found[name], own) for name, own in values.items())


def test_a_run_that_begins_again_reads_it_while_the_model_is_the_same(
    whole: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where files of the same content have another place in time, as on another node."""
    recipe, run = whole
    copy = begun(run, tmp_path)
    shifted = shift(copy / FILE)
    model = recipe.parent / "model" / "model.safetensors"
    content = model.read_bytes()
    model.unlink()
    model.write_bytes(content)
    train_here(recipe, f"output_dir={tmp_path}")
    assert is_kept(copy / FILE, shifted)


@pytest.mark.parametrize("adapter", [None, "adapter={kind: lora, r: 4, target_modules: [q_proj]}"])
def test_the_model_was_trained_again_in_its_place(
    adapter: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that begins again begins with it. One that goes on holds all that was trained, or is refused."""
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text(yaml.safe_dump(judged_recipe(tmp_path, "dpo", name="dpo")))
    settings = [] if adapter is None else [adapter]
    run = train_here(recipe, f"output_dir={tmp_path / 'runs'}", *settings)
    kept = load_file(run / FILE)
    retrained(tmp_path / "model")

    again = begun(run, tmp_path / "again")
    with caplog.at_level(logging.WARNING):
        train_here(recipe, f"output_dir={tmp_path / 'again'}", *settings)
    assert "the model's weights changed since the log-probabilities under the reference were computed" in caplog.text
    assert not is_kept(again / FILE, kept)

    goes_on = stopped(run, tmp_path / "goes-on")
    if adapter is None:
        train_here(recipe, f"output_dir={tmp_path / 'goes-on'}", *settings)
        assert is_kept(goes_on / FILE, kept)
    else:
        with pytest.raises(InputError, match="the model's weights changed") as caught:
            train_here(recipe, f"output_dir={tmp_path / 'goes-on'}", *settings)
        assert caught.value.remedy is not None and "bring the former weights back" in caught.value.remedy


def test_that_of_a_run_which_never_trained_is_computed_anew(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = whole
    killed = tmp_path / run.name
    killed.mkdir()
    kept = load_file(run / FILE)
    of_another_model = {name: values - 5 for name, values in kept.items()}
    save_file(of_another_model, killed / FILE, metadata(run / FILE))
    train_here(recipe, f"output_dir={tmp_path}")
    assert all(torch.equal(values, kept[name]) for name, values in load_file(killed / FILE).items())
