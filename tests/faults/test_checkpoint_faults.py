"""Checkpoints of one process under real faults: SIGKILL, rotten and missing files, a full disk."""

import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.contracts import Shard
from llmtrain.errors import TrainingError
from tests.unit.checkpoint.states import (
    assert_holds,
    blank,
    contents,
    run_alone,
    save,
    small_disk,
    start_alone,
    store_in,
    tensors,
    whole,
)

# ----------------------------------------------------------------------------------------- SIGKILL

# A process that has imported torch once forks the ones that are killed: a round costs no import.
SAVE_FOREVER = """
for line in sys.stdin:
    step, asynchronous = map(int, line.split())
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    store = store_in(directory, asynchronous=bool(asynchronous))
    while True:
        step += 1
        shards = whole(tensors(step) | {"policy/huge": torch.full((500_000,), float(step))})
        store.save(step, shards, contents(step))
"""


def _last_step(directory: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in directory.glob("step-*")), default=0)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_sigkill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    moments = random.Random(20260101)
    directory = tmp_path / "checkpoints"
    store = store_in(directory)
    step, leftovers = 0, 0
    with start_alone(directory, SAVE_FOREVER) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(15):
            print(step, int(asynchronous), file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            # Not sooner than one new checkpoint, so that every round has something to lose.
            while _last_step(directory) == step:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert int(process.stdout.readline()) == -signal.SIGKILL
            leftovers += len([*directory.glob(".writing-*"), *directory.glob(".removing-*")])
            newest = store.newest()
            # The newest that is there by name is whole: a rename never shows a half-written one.
            assert newest is not None and newest.name == f"step-{_last_step(directory):08d}"
            assert _last_step(directory) > step
            step = _last_step(directory)
            _assert_holds_with_huge(store, newest, step)
        process.stdin.close()
    assert leftovers > 0, "no kill hit a save: the test tested nothing"
    save(store, step + 1)
    assert sorted(path.name for path in directory.iterdir()) == [f"step-{step:08d}", f"step-{step + 1:08d}"]


def _assert_holds_with_huge(store: CheckpointStore, path: Path, step: int) -> None:
    expected = whole(tensors(step) | {"policy/huge": torch.full((500_000,), float(step))})
    read = blank(expected)
    restored = store.restore(path, read)
    assert restored.step == step and restored.state["tokens"] == step * 7
    assert restored.rank_tensors is not None and restored.rank_tensors["own"].item() == step
    assert all(torch.equal(read[name].local, shard.local) for name, shard in expected.items())


# -------------------------------------------------------------------------------------- corruption


def _flip(path: Path, chooser: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
    path.write_bytes(content)


def _cut_tail(path: Path, chooser: random.Random) -> None:
    os.truncate(path, chooser.randrange(path.stat().st_size))


def _zero(path: Path, chooser: random.Random) -> None:
    """A block that never reached the disk."""
    content = bytearray(path.read_bytes())
    start = chooser.randrange(max(1, len(content) - 4096))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def _grow(path: Path, chooser: random.Random) -> None:
    with path.open("ab") as file:
        file.write(bytes(chooser.randrange(1, 4096)))


def _remove(path: Path, chooser: random.Random) -> None:
    path.unlink()


def _empty(path: Path, chooser: random.Random) -> None:
    os.truncate(path, 0)


def _replace_by_directory(path: Path, chooser: random.Random) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "flipped bit": (_flip, 12),
    "truncated": (_cut_tail, 4),
    "zeroed block": (_zero, 4),
    "grown": (_grow, 2),
    "missing": (_remove, 1),
    "emptied": (_empty, 1),
    "directory": (_replace_by_directory, 1),
}
FILES = ("state-rank-00000.safetensors", "tensors.json", "state.json")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, to be copied."""
    directory = tmp_path_factory.mktemp("two")
    store = store_in(directory)
    save(store, 1)
    save(store, 2, loss=1.0)
    return directory


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_the_older_one_serves_whatever_happened_to_a_file(
    run: Path, caplog: pytest.LogCaptureFixture, name: str, fault: str
) -> None:
    do, places = FAULTS[fault]
    chooser = random.Random(f"{name} {fault}")
    newest, file = run / "step-00000002", run / "step-00000002" / name
    original = file.read_bytes()
    for _ in range(places):
        caplog.clear()
        do(file, chooser)
        with caplog.at_level(logging.WARNING, "llmtrain"):
            assert store_in(run).newest() == run / "step-00000001"
        assert f"checkpoint {newest} is passed over: {name} " in caplog.text
        if file.is_dir():
            file.rmdir()
        file.write_bytes(original)
    store = store_in(run)
    assert_holds(store, run / "step-00000001", 1)
    assert store.newest() == newest
    assert_holds(store, newest, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_that_changed_is_seen_or_harmless(run: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    """No hash covers it: what can change there unseen changes nothing that is loaded."""
    do, places = FAULTS[fault]
    chooser = random.Random(fault)
    newest, file = run / "step-00000002", run / "step-00000002" / "manifest.json"
    original = file.read_bytes()
    for _ in range(places * 5):
        caplog.clear()
        if file.is_dir():
            file.rmdir()
        file.write_bytes(original)
        do(file, chooser)
        store = store_in(run)
        with caplog.at_level(logging.WARNING, "llmtrain"):
            found = store.newest()
        if found == newest:
            assert fault == "flipped bit"
            assert_holds(store, newest, 2)
        else:
            assert found == run / "step-00000001"
            assert f"checkpoint {newest} is passed over: " in caplog.text
    assert_holds(store, run / "step-00000001", 1)


def test_any_flipped_bit_is_seen_or_harmless(run: Path) -> None:
    shutil.rmtree(run / "step-00000001")
    places = random.Random(7)
    path = run / "step-00000002"
    store = store_in(run)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for position in places.sample(range(len(original)), min(60, len(original))):
            flipped = bytearray(original)
            flipped[position] ^= 1 << places.randrange(8)
            file.write_bytes(flipped)
            newest = store_in(run).newest()
            assert newest is None or file.name == "manifest.json"
            if newest is not None:
                assert_holds(store, newest, 2)
        file.write_bytes(original)
    assert store.newest() == path


def _swap_hashes(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    files = manifest["files"]
    files["state.json"], files["tensors.json"] = files["tensors.json"], files["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _take_manifest_of_the_older(path: Path) -> None:
    manifest = json.loads((path.with_name("step-00000001") / "manifest.json").read_text()) | {"step": 2}
    (path / "manifest.json").write_text(json.dumps(manifest))


def _forget_a_file(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["state-rank-00000.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _write_half(path: Path) -> None:
    for name in ("manifest.json", "state.json"):
        (path / name).unlink()
    os.truncate(path / "state-rank-00000.safetensors", 1000)


def _write_nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _put_a_file_there(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


WHOLE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another file's hash": (_swap_hashes, "state.json has "),
    "another checkpoint's manifest": (_take_manifest_of_the_older, "does not match its sha256"),
    "a file without a hash": (_forget_a_file, "manifest.json lists no state-rank-00000.safetensors"),
    "half-written": (_write_half, "manifest.json is missing"),
    "empty": (_write_nothing, "manifest.json is missing"),
    "torn manifest": (lambda path: os.truncate(path / "manifest.json", 200), "manifest.json is no manifest of ours"),
    "renamed": (lambda path: path.rename(path.with_name("step-00000099")), "manifest.json is of step 2"),
    "a file": (_put_a_file_there, "manifest.json cannot be read: Not a directory"),
}


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_the_older_one_serves_and_the_log_says_why(run: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    do, reason = WHOLE_FAULTS[fault]
    do(run / "step-00000002")
    (run / ".writing-step-00000003").mkdir()
    store = store_in(run)
    with caplog.at_level(logging.WARNING, "llmtrain"):
        assert store.newest() == run / "step-00000001"
    assert_holds(store, run / "step-00000001", 1)
    name = "step-00000099" if fault == "renamed" else "step-00000002"
    assert f"{name} is passed over: " in caplog.text and reason in caplog.text
    assert ".writing-step-00000003 is what an interrupted save" in caplog.text


# --------------------------------------------------------------------------------------- full disk


HUGE = {"policy/huge": Shard(torch.zeros(10_000_000), 0, (10_000_000,))}


def _assert_told(text: str, step: int, reason: str) -> None:
    assert f"step-{step:08d} could not be written" in text and reason in text
    assert "its tensors take 40.0 MB" in text and " are free in " in text and "make room" in text


def _save_huge(store: CheckpointStore, step: int, *, required: bool) -> None:
    store.save(step, HUGE, contents(step), required=required)
    store.wait()


@pytest.mark.parametrize("required", [False, True], ids=["", "required"])
@pytest.mark.parametrize("on_full_disk", ["fail", "continue"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asynchronous: bool, on_full_disk: str, required: bool
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk / "checkpoints", asynchronous=asynchronous, on_full_disk=on_full_disk)
        older = save(store, 1)
        before = {path: path.stat().st_mtime_ns for path in older.rglob("*")}
        if on_full_disk == "continue" and not required:
            with caplog.at_level(logging.WARNING, "llmtrain"):
                _save_huge(store, 2, required=required)
            _assert_told(caplog.text, 2, "No space left on device")
            assert "checkpoint.on_full_disk is continue: the run goes on without it" in caplog.text
        else:
            with pytest.raises(TrainingError) as failure:
                _save_huge(store, 2, required=required)
            _assert_told(str(failure.value), 2, "No space left on device")
        assert {path: path.stat().st_mtime_ns for path in older.rglob("*")} == before
        assert [*store.directory.iterdir()] == [older] == [store.newest()]
        assert_holds(store, older, 1)
        # When there is room again, a later one is written.
        assert_holds(store, save(store, 3), 3)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))
        if on_full_disk == "continue":
            save(store, 4)
            assert store.newest() == disk / "checkpoints" / "step-00000003"
            (disk / "other").unlink()
            assert_holds(store, save(store, 5), 5)
            assert store.newest() == disk / "checkpoints" / "step-00000005"


def test_a_disk_that_fills_up_while_the_manifest_is_written(tmp_path: Path) -> None:
    """The tensors fit and the small files do not: the last moment at which a save can fail."""
    with small_disk(tmp_path / "disk") as disk:
        probe = save(store_in(disk / "probe"), 1)
        needed = sum(-(-file.stat().st_size // 4096) * 4096 for file in probe.iterdir())
        shutil.rmtree(disk / "probe")
        store = store_in(disk / "checkpoints")
        older = save(store, 1)
        for room in range(needed - 3 * 4096, needed, 4096):
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - room))
            with pytest.raises(TrainingError, match="No space left on device"):
                save(store, 2)
            assert [*store.directory.iterdir()] == [older] == [store.newest()]
            (disk / "other").unlink()
        assert_holds(store, save(store, 2), 2)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_file_size_limit_is_no_full_disk(tmp_path: Path, asynchronous: bool) -> None:
    code = """
store = store_in(directory, asynchronous=bool(int(sys.argv[2])), on_full_disk="continue")
older = save(store, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
try:
    store.save(2, {"policy/huge": Shard(torch.zeros(10_000_000), 0, (10_000_000,))}, contents(2))
    store.wait()
except TrainingError as error:
    print(error)
assert store.newest() == older
"""
    done = run_alone(tmp_path, code, str(int(asynchronous)))
    assert done.returncode == 0, done.stderr
    _assert_told(done.stdout, 2, "File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
