"""`llmtrain checkpoint convert`; tests/distributed/test_convert.py has DeepSpeed itself read what it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtrain import cli
from llmtrain.checkpoint import convert
from llmtrain.checkpoint.manifest import read_state
from llmtrain.errors import InputError
from tests.runs import assert_same, final_weights, train_here, training_state, write_recipe

THIRD = "step-00000003"
PARAMETER = Path("zero", "model.norm.weight")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("run"), ema={"decay": 0.5})


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    return train_here(recipe)


@pytest.fixture(scope="module")
def converted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    universal = tmp_path_factory.mktemp("converted") / "universal"
    convert.to_universal(run / "checkpoints" / THIRD, universal)
    return universal


@pytest.fixture
def universal(converted: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(converted, tmp_path / "universal"))


def refused(source: Path, dest: Path) -> str:
    """What is said of a universal checkpoint that is not taken; nothing may be left of the attempt."""
    with pytest.raises(InputError) as error:
        convert.to_llmtrain(source, dest)
    assert not dest.exists() or not any(dest.iterdir())
    return str(error.value)


def test_there_and_back_keeps_every_bit(run: Path, converted: Path, tmp_path: Path) -> None:
    assert (converted / "latest_universal").read_text() == "global_step3"
    back = tmp_path / "back"
    convert.to_llmtrain(converted, back / "checkpoints")
    before = training_state(run, 3)
    assert any(name.startswith("policy/ema.") for name in before)
    assert_same(training_state(back, 3), before)
    assert read_state(back / "checkpoints" / THIRD) == read_state(run / "checkpoints" / THIRD)
    stored = load_file(back / "checkpoints" / THIRD / "state-rank-00000.safetensors")
    assert stored.keys() == before.keys()  # no generators


def test_a_run_goes_on_from_what_came_back(recipe: Path, run: Path, converted: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "runs" / "tiny"))
    for name in ("checkpoints", "final"):
        shutil.rmtree(again / name)
    convert.to_llmtrain(converted / "global_step3", again)  # it goes into checkpoints/
    assert train_here(recipe, f"output_dir={tmp_path / 'runs'}") == again
    starts = (again / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["resume_step"] == 3
    assert_same(final_weights(again), final_weights(run))
    assert_same(training_state(again, 6), training_state(run, 6))


def test_a_parameter_has_the_name_and_shape_of_transformers(run: Path, converted: Path) -> None:
    files = converted / "global_step3" / "zero"
    names = {path.parent.name for path in files.rglob("fp32.pt")}
    assert names == set(load_file(run / "final" / "model.safetensors"))
    weight = torch.load(files / "model.layers.0.mlp.up_proj.weight" / "fp32.pt", weights_only=True)["param"]
    assert weight.shape == (64, 32)
    assert torch.load(files / "lm_head.weight" / "step.pt", weights_only=True) == 3


def test_of_a_run_the_newest_whole_one_is_taken(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    convert.to_universal(copy, tmp_path / "newest")
    assert (tmp_path / "newest" / "global_step6").is_dir()
    newest = copy / "checkpoints" / "step-00000006"
    flip_last_byte(newest / "state-rank-00000.safetensors")
    convert.to_universal(copy, tmp_path / "older")
    assert (tmp_path / "older" / "global_step3").is_dir()
    assert f"{newest} is passed over" in capsys.readouterr().err
    with pytest.raises(InputError, match="does not match its sha256"):
        convert.to_universal(newest, tmp_path / "broken")
    (copy / "checkpoints" / THIRD / "manifest.json").unlink()
    with pytest.raises(InputError, match="no checkpoint in .* is whole"):
        convert.to_universal(copy, tmp_path / "broken")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "newest", "older"}


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("to", ["universal", "llmtrain"])
def test_nothing_is_overwritten(
    to: str, run: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, existing = (run, tmp_path) if to == "universal" else (converted, tmp_path / THIRD)
    existing.mkdir(exist_ok=True)
    assert cli.main(["checkpoint", "convert", str(source), str(tmp_path), "--to", to]) == 2
    assert f"DEST: {existing} exists" in capsys.readouterr().err
    assert not any(existing.iterdir())


def test_a_file_that_is_missing_or_damaged(universal: Path, tmp_path: Path) -> None:
    weight = universal / "global_step3" / PARAMETER / "fp32.pt"
    whole = weight.read_bytes()
    middle = whole.index(torch.load(weight, weights_only=True)["param"].numpy().tobytes())
    weight.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert f"{weight}: " in (said := refused(universal, tmp_path / "back")) and "checksum" in said
    weight.write_bytes(whole[: len(whole) // 2])
    assert f"{weight}: it is no file of torch.save" in refused(universal, tmp_path / "back")
    torch.save({"param": torch.zeros(7)}, weight)
    assert "holds torch.float32 of shape [7], and not F32 of shape [32]" in refused(universal, tmp_path / "back")
    torch.save({"param": 7}, weight)
    assert f"{weight} holds no tensor" in refused(universal, tmp_path / "back")
    weight.unlink()
    assert f"{weight}: it is missing" in refused(universal, tmp_path / "back")


class Trap:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(universal: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    trap = universal / "global_step3" / PARAMETER / "exp_avg.pt"
    for zipped in (True, False):
        torch.save({"param": Trap(mark)}, trap, _use_new_zipfile_serialization=zipped)
        assert f"{trap}: it" in refused(universal, tmp_path / "back")
        assert not mark.exists()
    torch.load(trap, weights_only=False)
    assert mark.exists()  # it is a trap


def test_one_that_we_did_not_write(universal: Path, tmp_path: Path) -> None:
    ours = universal / "global_step3" / "llmtrain"
    flip_last_byte(ours / THIRD / "state.json")
    assert "state.json does not match its sha256" in refused(universal, tmp_path / "back")
    shutil.rmtree(ours)
    assert "only its weights can be taken" in refused(universal, tmp_path / "back")
    (universal / "latest_universal").write_text("../universal/global_step3")
    assert "no directory beside it" in refused(universal, tmp_path / "back")
    assert "no universal checkpoint" in refused(tmp_path, tmp_path / "back")
