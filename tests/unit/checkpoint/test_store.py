import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.store import CheckpointStore, Loaded
from llmtrain.distributed import World
from llmtrain.errors import InputError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def _state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(16, 8, generator=generator)
    return {
        "model.embedding": weight,
        "model.head": weight,  # tied
        "optimizer.moment": torch.randn(8, 16, generator=generator).T,
        "half": weight.bfloat16(),
        "step": torch.tensor(float(step)),
    }


def _save(store: CheckpointStore, step: int) -> Path:
    return store.save(
        step, _state(step), {"torch_cpu": torch.get_rng_state()}, {"tokens": step * 7, "deep": [{"a": 0.1}]}
    )


def _assert_is(loaded: Loaded, step: int) -> None:
    assert loaded.step == step and loaded.state == {"tokens": step * 7, "deep": [{"a": 0.1}]}
    expected = _state(step)
    assert set(loaded.tensors) == set(expected)
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "checkpoints", 2, ALONE)
    assert store.newest() is None
    path = _save(store, 3)
    assert path == tmp_path / "deep" / "checkpoints" / "step-00000003" == store.newest()
    loaded = store.load(path)
    _assert_is(loaded, 3)
    assert loaded.world_size == 1 and loaded.rank_tensors is not None
    assert torch.equal(loaded.rank_tensors["torch_cpu"], torch.get_rng_state())
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "state-rank-00000.safetensors",
        "state.json",
    ]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["torch"] == torch.__version__


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, ALONE)
    (tmp_path / ".writing-step-00000001").mkdir()
    (tmp_path / ".removing-step-00000001").mkdir()
    for step in (1, 5, 10, 100):
        _save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, ALONE)
    manifest = _save(store, 4) / "manifest.json"
    before = manifest.stat().st_mtime_ns, manifest.stat().st_ino
    store.save(4, {"other": torch.zeros(1)}, {}, {})
    assert (manifest.stat().st_mtime_ns, manifest.stat().st_ino) == before
    _assert_is(store.load(store.directory / "step-00000004"), 4)


def test_a_broken_step_is_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, ALONE)
    (_save(store, 4) / "state.json").write_text("{}")
    assert store.newest() is None
    path = _save(store, 4)
    assert store.newest() == path
    _assert_is(store.load(path), 4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_newer_one_does_not_push_out_the_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, ALONE)
    whole = _save(store, 10)
    kept = CheckpointStore(tmp_path, 2, ALONE)
    (_save(kept, 20) / "manifest.json").unlink()
    assert store.newest() == whole
    newer = _save(store, 15)
    assert store.newest() == newer and not whole.exists()


def test_other_world_sizes_get_no_rank_tensors(tmp_path: Path) -> None:
    path = _save(CheckpointStore(tmp_path, 2, ALONE), 4)
    loaded = CheckpointStore(tmp_path, 2, World(0, 2, 0, 2, torch.device("cpu"))).load(path)
    assert loaded.rank_tensors is None and loaded.world_size == 1
    _assert_is(loaded, 4)


def test_loading_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        CheckpointStore(tmp_path, 2, ALONE).load(tmp_path)


def test_nan_in_the_small_state_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, ALONE)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.save(1, {}, {}, {"loss": float("nan")})
    assert store.newest() is None


def test_passing_over_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, 3, ALONE)
    older = _save(store, 1)
    (_save(store, 2) / "manifest.json").write_text('{"format": 2}')
    _save(store, 3).joinpath("state.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == older
    text = caplog.text
    assert "step-00000002 is passed over: manifest.json is no manifest of ours: format: Input should be 1" in text
    assert "step-00000003 is passed over: state.json is missing" in text
    assert "step-00000009 is passed over: manifest.json is missing" in text


def test_saving_and_verifying_take_no_second_copy_in_memory(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import torch
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.distributed import World
from llmtrain.observe.memory import peak_memory_bytes
cpu = torch.device("cpu")
store = CheckpointStore(Path(sys.argv[1]), 2, World(0, 1, 0, 1, cpu))
tensors = {str(i): torch.ones(10_000_000) for i in range(8)} | {"strided": torch.ones(1000, 1000).T}
before = peak_memory_bytes(cpu)
store.save(1, tensors, {}, {})
assert store.newest() is not None
print(peak_memory_bytes(cpu) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40e6  # of 324 MB: one strided tensor of 4 MB and buffers
