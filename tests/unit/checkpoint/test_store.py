"""The checkpoints of one process: what is saved, what is read back, and what is refused."""

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

import llmtrain
from llmtrain.checkpoint.store import CheckpointStore, Contents
from llmtrain.contracts import Shard
from llmtrain.distributed import World
from llmtrain.errors import InputError, TrainingError
from tests.unit.checkpoint.states import (
    assert_holds,
    blank,
    contents,
    reseal,
    run_alone,
    save,
    store_in,
    tensors,
    whole,
)

TWO = World(0, 2, 0, 2, torch.device("cpu"))


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    store = store_in(tmp_path / "deep" / "checkpoints", asynchronous=asynchronous)
    assert store.newest() is None
    path = save(store, 3, loss=2.5)
    assert path == tmp_path / "deep" / "checkpoints" / "step-00000003" == store.newest()
    own = assert_holds(store, path, 3).rank_tensors
    assert own is not None and own["own"].item() == 3 and own["empty"].shape == (0,)
    names = ["manifest.json", "state-rank-00000.safetensors", "state.json", "tensors.json"]
    assert sorted(file.name for file in path.iterdir()) == names
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == set(names) - {"manifest.json"}
    assert manifest["step"] == 3 and manifest["metrics"] == {"loss": 2.5} and manifest["world_size"] == 1
    assert manifest["engine"] == "by hand" and manifest["format"] == 2
    assert manifest["torch"] == torch.__version__ and manifest["llmtrain"] == llmtrain.__version__


def test_synchronous_and_asynchronous_saves_give_the_same_bytes(tmp_path: Path) -> None:
    synchronous = bytes_of(save(store_in(tmp_path / "a", asynchronous=False), 5))
    asynchronous = bytes_of(save(store_in(tmp_path / "b", asynchronous=True), 5))
    required = bytes_of(save(store_in(tmp_path / "c", asynchronous=True), 5, required=True))
    for one in (synchronous, asynchronous, required):
        manifest = json.loads(one.pop("manifest.json"))
        assert manifest.pop("time") and manifest["step"] == 5
    assert synchronous == asynchronous == required


def test_training_on_does_not_change_what_an_asynchronous_save_writes(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    state, large = tensors(1), torch.full((20_000_000,), 7.0)
    shards = whole(state | {"policy/huge": large})
    metrics, deep = {"loss": 1.0}, {"a": 0.1}
    own, counters = {"own": torch.tensor(1)}, {"tokens": 7, "deep": [deep]}
    store.save(1, shards, Contents(own, counters, metrics, "by hand"))
    assert not (tmp_path / "step-00000001").exists()  # 80 MB are not written yet
    for tensor in [*(state[name] for name in state), large, own["own"]]:
        tensor.zero_()
    counters["tokens"], deep["a"], metrics["loss"] = 0, 0.0, float("nan")
    store.wait()
    read = blank(shards)
    restored = store.restore(tmp_path / "step-00000001", read)
    assert restored.state == {"tokens": 7, "deep": [{"a": 0.1}]}
    assert restored.rank_tensors is not None and restored.rank_tensors["own"].item() == 1
    assert json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())["metrics"] == {"loss": 1.0}
    assert (read["policy/huge"].local == 7).all()
    assert all(torch.equal(read[name].local, tensor) for name, tensor in tensors(1).items())


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    """They write from the same copies."""
    store = store_in(tmp_path, keep=9)
    huge = torch.zeros(10_000_000)
    for step in (1, 2, 3):
        huge.fill_(step)
        store.save(step, {"huge": Shard(huge, 0, (10_000_000,))}, contents(step))
        assert {path.name for path in tmp_path.glob("step-*")} >= {f"step-{s:08d}" for s in range(1, step)}
    store.wait()
    for step in (1, 2, 3):
        assert store.newest() == tmp_path / "step-00000003"
        store.restore(tmp_path / f"step-{step:08d}", {"huge": Shard(huge, 0, (10_000_000,))})
        assert (huge == step).all()


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for leftover in (".writing-step-00000001", ".removing-step-00000001"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("half")
    for step in (1, 5, 10, 100):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    manifest = save(store, 4) / "manifest.json"
    before = manifest.stat().st_mtime_ns, manifest.stat().st_ino
    store.save(4, {"other": Shard(torch.zeros(1), 0, (1,))}, Contents({}, {}, {}, ""), required=True)
    assert (manifest.stat().st_mtime_ns, manifest.stat().st_ino) == before
    assert_holds(store, store.directory / "step-00000004", 4)


def test_a_broken_step_is_written_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    (save(store, 4) / "state.json").write_text("{}")
    assert store.newest() is None
    path = save(store, 4)
    assert store.newest() == path
    assert_holds(store, path, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_other_world_sizes_get_no_rank_tensors(tmp_path: Path) -> None:
    path = save(store_in(tmp_path), 4)
    assert assert_holds(store_in(tmp_path, TWO), path, 4).rank_tensors is None


def test_figures_that_are_not_finite_leave_the_manifest_readable(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    path = save(store, 1, loss=float("nan"), perplexity=float("inf"), accuracy=0.5)
    assert json.loads((path / "manifest.json").read_text())["metrics"] == {"accuracy": 0.5}
    assert store.newest() == path


def test_the_end_of_the_with_block_is_the_end_of_the_save(tmp_path: Path) -> None:
    huge = {"huge": Shard(torch.zeros(10_000_000), 0, (10_000_000,))}
    with store_in(tmp_path) as store:
        store.save(1, huge, contents(1))
    assert store.newest() == tmp_path / "step-00000001"
    # Also where the run failed: what was being saved is from before that.
    with pytest.raises(ZeroDivisionError):
        _save_and_fail(store, huge)
    assert store.newest() == tmp_path / "step-00000002"


def _save_and_fail(store: CheckpointStore, shards: dict[str, Shard]) -> None:
    with store:
        store.save(2, shards, contents(2))
        raise ZeroDivisionError


# --------------------------------------------------------------------------------------- refusals


def test_loading_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        store_in(tmp_path).restore(tmp_path, {})


@pytest.mark.parametrize("asynchronous", [True, False])
def test_nan_in_the_small_state_is_refused(tmp_path: Path, asynchronous: bool) -> None:
    store = store_in(tmp_path, asynchronous=asynchronous)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.save(1, {}, Contents({}, {"loss": float("nan")}, {}, ""))
    assert store.newest() is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        (Shard(torch.zeros(4), 0, (10,)), "w: the ranks save 4 elements of 10"),
        (Shard(torch.zeros(4), 6, (10,)), "w: no rank saves elements 0 to 5"),
        (Shard(torch.zeros(12), 0, (10,)), "w: the ranks save 12 elements of 10"),
        (Shard(torch.zeros(3, 4).T, 0, (4, 3)), r"w: the state must be contiguous, and this has strides \(1, 4\)"),
        (Shard(torch.zeros(3, dtype=torch.complex64), 0, (3,)), "tensor 'w': safetensors has no torch.complex64"),
    ],
)
def test_shards_that_are_wrong_are_never_published(
    tmp_path: Path, shard: Shard, problem: str, asynchronous: bool
) -> None:
    store = store_in(tmp_path, asynchronous=asynchronous)
    older = save(store, 1)
    with pytest.raises((ValueError, RuntimeError), match=problem):
        _save_to_the_end(store, 2, {"w": shard})
    assert store.newest() == older and [*tmp_path.glob("step-*")] == [older]
    save(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def _save_to_the_end(store: CheckpointStore, step: int, shards: dict[str, Shard]) -> None:
    store.save(step, shards, contents(step))
    store.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_went_wrong_is_raised_once(tmp_path: Path, asynchronous: bool) -> None:
    (tmp_path / "file").write_text("no directory")
    store = store_in(tmp_path / "file" / "checkpoints", asynchronous=asynchronous)
    with pytest.raises(TrainingError, match=r"step-00000001 could not be written: rank 0: .*Not a directory"):
        save(store, 1)
    store.wait()
    (tmp_path / "file").unlink()
    assert_holds(store, save(store, 2), 2)


def test_an_error_of_the_save_before_is_raised_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    store = store_in(tmp_path / "file")
    store.save(1, whole(tensors(1)), contents(1))
    with pytest.raises(TrainingError, match="step-00000001 could not be written"):
        store.save(2, whole(tensors(2)), contents(2))


def test_a_save_that_is_lost_with_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no directory")
    with caplog.at_level(logging.WARNING, "llmtrain"), pytest.raises(ZeroDivisionError):
        _save_and_fail(store_in(tmp_path / "file"), whole(tensors(2)))
    assert "checkpoint step-00000002, under way when the run failed, is lost: " in caplog.text
    assert "Not a directory" in caplog.text


# ------------------------------------------------------------------------------ what is passed over


def test_passing_over_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(tmp_path, keep=9)
    older = save(store, 1)
    (save(store, 2) / "manifest.json").write_text('{"format": 2}')
    save(store, 3).joinpath("state.json").unlink()
    format_1 = {"format": 1, "step": 4, "llmtrain": "0.1.0", "torch": "2.13.0", "files": {}}
    (save(store, 4) / "manifest.json").write_text(json.dumps(format_1))
    (tmp_path / "step-00000009").mkdir()
    with caplog.at_level(logging.WARNING, "llmtrain"):
        assert store.newest() == older
    text = caplog.text
    assert "step-00000002 is passed over: manifest.json is no manifest of ours: step: Field required" in text
    assert "step-00000003 is passed over: state.json is missing" in text
    assert "step-00000004 is passed over: it is of format 1, and this version of llmtrain reads format 2 only" in text
    assert "step-00000009 is passed over: manifest.json is missing" in text


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    store = store_in(tmp_path / "checkpoints")
    path = save(store, 1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + header_bytes])
        else:
            json.loads(file.read_bytes())
    # Where DCP, torch.save and its users keep pickles.
    for name in (".metadata", "state-rank-00000.pt", "__0_0.distcp", "state.pkl", "state-rank-00001.safetensors"):
        (path / name).write_bytes(pickle.dumps(Evil()))
    assert store.newest() == path
    assert_holds(store, path, 1)
    # Nor where one is in the place of a file of ours, whatever the manifest says.
    for name in ("state-rank-00000.safetensors", "state.json", "tensors.json", "manifest.json"):
        original = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Evil()))
        if name != "manifest.json":
            reseal(path)
        try:
            newest = store_in(tmp_path / "checkpoints").newest()
            if newest is not None:
                store.restore(newest, blank(whole(tensors(1))))
        except (InputError, ValueError):
            pass
        else:
            assert newest is None
        (path / name).write_bytes(original)
        reseal(path)
    assert not (tmp_path / "it-ran").exists()
    assert_holds(store, path, 1)


def test_records_that_were_altered_with_their_hash_are_refused(tmp_path: Path) -> None:
    """No hash tells who edits the manifest too; what does not fit together is not loaded all the same."""
    store = store_in(tmp_path)
    path = save(store, 1)
    whole_records = json.loads((path / "tensors.json").read_text())

    def altered(name: str, **values: object) -> Path | None:
        records = whole_records | {name: whole_records[name] | values}
        (path / "tensors.json").write_text(json.dumps(records))
        reseal(path)
        return store_in(tmp_path).newest()

    assert altered("policy/large", starts=[0, 9]) is None
    assert altered("policy/large", starts=[5]) is None
    assert altered("policy/large", ranks=[1]) is None  # a file that no hash covers
    changes: dict[str, dict[str, object]] = {
        "policy/large": {"dtype": "BF16"},
        "policy/model.half": {"dtype": "F32"},
        "policy/model.head": {"shape": [16, 9]},
        "policy/model.part": {"shape": [24]},
        "policy/mask": {"dtype": "F99"},
    }
    for name, values in changes.items():
        assert altered(name, **values) == path
        with pytest.raises(InputError, match="another model, optimizer or precision"):
            store.restore(path, blank(whole(tensors(1))))
    # Where the run needs just what the altered records say, the file tells.
    assert altered("policy/model.part", shape=[4, 8]) == path
    longer = blank(whole(tensors(1))) | {"policy/model.part": Shard(torch.zeros(4, 8), 0, (4, 8))}
    with pytest.raises(InputError, match="policy/model.part: state-rank-00000.safetensors does not hold") as caught:
        store.restore(path, longer)
    assert "move it out of the run directory" in str(caught.value)


# -------------------------------------------------------------------------------------- resources

MEASURED = """
from llmtrain.observe.memory import peak_memory_bytes
asynchronous = sys.argv[2] == "asynchronous"
store = store_in(directory, asynchronous=asynchronous)
state = whole({str(i): torch.ones(5_000_000) for i in range(8)})
peaks = [peak_memory_bytes(ALONE.device)]
for step in (1, 2):
    store.save(step, state, contents(step))
    store.wait()
    assert store.newest() is not None
    peaks.append(peak_memory_bytes(ALONE.device))
print(*[after - before for before, after in zip(peaks, peaks[1:])])
"""


@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_memory_of_saving_and_verifying(tmp_path: Path, how: str) -> None:
    done = run_alone(tmp_path, MEASURED, how)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    copies = 160e6 if how == "asynchronous" else 0  # one in host memory, or none
    assert copies * 0.98 <= first < copies + 10e6
    assert second < 1e6  # and it is used again


def test_no_file_and_no_thread_stays_behind(tmp_path: Path) -> None:
    code = """
import threading, time
def held():
    deadline = time.monotonic() + 20  # DCP tells its thread to end, and does not wait for it
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/fd")), threading.active_count()
for asynchronous in (False, True):
    store = store_in(directory, asynchronous=asynchronous)
    seen = []
    for step in range(1, 8):
        path = save(store, step + 100 * asynchronous)
        assert store.newest() == path
        assert_holds(store, path, step + 100 * asynchronous)
        try:
            store.save(999, {"w": Shard(torch.zeros(2), 0, (9,))}, contents(999))
            store.wait()
        except RuntimeError:
            pass
        seen.append(held())
    print(seen)
    assert seen[1] == seen[-1]
"""
    done = run_alone(tmp_path, code)
    assert done.returncode == 0, done.stdout + done.stderr
