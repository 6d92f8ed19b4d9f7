"""Checkpoints under real faults: SIGKILL, rotten and missing files, a full disk, several ranks."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import llmtrain
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.distributed import World
from llmtrain.errors import TrainingError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))

COMMON = """
import resource, shutil, sys
from pathlib import Path
import torch
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.distributed import World, joined
from llmtrain.errors import InputError, TrainingError

def tensors(step, rank=0):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return {f"{rank}.{i}": torch.randn(500, 100, generator=generator) for i in range(10)}
"""

SAVE_FOREVER = """
store = CheckpointStore(Path(sys.argv[1]), 2, World(0, 1, 0, 1, torch.device("cpu")))
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    store.save(step, tensors(step), {"own": torch.tensor(step)}, {"step": step})
"""


def _tensors(step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return {f"{rank}.{i}": torch.randn(500, 100, generator=generator) for i in range(10)}


def _save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, _tensors(step), {"own": torch.tensor(step)}, {"step": step})


def _assert_whole(store: CheckpointStore, path: Path) -> int:
    loaded = store.load(path)
    expected = _tensors(loaded.step)
    assert loaded.state == {"step": loaded.step} and set(loaded.tensors) == set(expected)
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
    assert loaded.rank_tensors is not None and loaded.rank_tensors["own"].item() == loaded.step
    return loaded.step


def test_sigkill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(20260101)
    store = CheckpointStore(tmp_path, 2, ALONE)
    step, leftovers = 0, 0
    for _ in range(6):
        command = [sys.executable, "-c", COMMON + SAVE_FOREVER, str(tmp_path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            # Not sooner than one new checkpoint, so that every round has something to lose.
            while not any(int(path.name[5:]) > step for path in tmp_path.glob("step-*")):
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        leftovers += len([*tmp_path.glob(".writing-*"), *tmp_path.glob(".removing-*")])
        newest = store.newest()
        assert newest is not None
        found = _assert_whole(store, newest)
        # The newest that is there by name is whole too: a rename never shows a half-written one.
        assert found == max(int(path.name[5:]) for path in tmp_path.glob("step-*")) > step
        step = found
    assert leftovers > 0, "no kill hit a save: the test tested nothing"
    _save(store, step + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}", f"step-{step + 1:08d}"]


def _break(path: Path, fault: str) -> None:
    tensors = path / "state-rank-00000.safetensors"
    if fault == "flipped byte":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif fault == "truncated":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif fault == "missing file":
        tensors.unlink()
    elif fault == "missing manifest":
        (path / "manifest.json").unlink()
    elif fault == "torn manifest":
        os.truncate(path / "manifest.json", 200)
    elif fault == "empty manifest":
        os.truncate(path / "manifest.json", 0)
    elif fault == "renamed":
        path.rename(path.with_name("step-00000099"))
    elif fault == "unreadable":
        tensors.unlink()
        tensors.mkdir()


FAULTS = {
    "flipped byte": "state-rank-00000.safetensors does not match its sha256",
    "truncated": "state-rank-00000.safetensors has 200",
    "missing file": "state-rank-00000.safetensors is missing",
    "missing manifest": "manifest.json is missing",
    "torn manifest": "manifest.json is no manifest of ours",
    "empty manifest": "manifest.json is no manifest of ours",
    "renamed": "manifest.json is of step 2",
    "unreadable": "state-rank-00000.safetensors ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_older_one_serves_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    store = CheckpointStore(tmp_path, 2, ALONE)
    older = _save(store, 1)
    _break(_save(store, 2), fault)
    (tmp_path / ".writing-step-00000003").mkdir()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == older
    assert _assert_whole(store, older) == 1
    name = "step-00000099" if fault == "renamed" else "step-00000002"
    assert f"{name} is passed over: {FAULTS[fault]}" in caplog.text
    assert ".writing-step-00000003 is what an interrupted save" in caplog.text


def test_any_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    """Also in the manifest, which no hash covers: what can flip there changes nothing that is loaded."""
    places = random.Random(7)
    store = CheckpointStore(tmp_path, 1, ALONE)
    path = store.save(1, {"w": torch.randn(4, 4)}, {"own": torch.tensor(1)}, {"step": 1})
    expected = store.load(path).tensors["w"].clone()
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in places.sample(range(len(whole)), min(60, len(whole))):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << places.randrange(8)
            file.write_bytes(flipped)
            newest = CheckpointStore(tmp_path, 1, ALONE).newest()
            assert newest is None or file.name == "manifest.json"
            if newest is not None:
                loaded = store.load(newest)
                assert torch.equal(loaded.tensors["w"], expected) and loaded.state == {"step": 1}
        file.write_bytes(whole)
    assert store.newest() == path


def _assert_save_fails_cleanly(store: CheckpointStore, step: int, reason: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")}
    with pytest.raises(TrainingError) as failure:
        store.save(step, {"large": torch.zeros(10_000_000)}, {}, {})
    text = str(failure.value)
    assert f"step-{step:08d} could not be written" in text and reason in text
    assert "it needs 40.0 MB" in text and " are free in " in text
    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")} == before


def test_a_full_disk(tmp_path: Path) -> None:
    with _small_disk(tmp_path / "disk") as disk:
        store = CheckpointStore(disk / "checkpoints", 2, ALONE)
        older = _save(store, 1)
        _assert_save_fails_cleanly(store, 2, "No space left on device")
        assert store.newest() == older and _assert_whole(store, older) == 1
        _save(store, 3)  # a smaller one fits: the space was given back


@contextmanager
def _small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a 20 MB tmpfs is refused; runs as root with CAP_SYS_ADMIN")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_file_size_limit(tmp_path: Path) -> None:
    code = """
store = CheckpointStore(Path(sys.argv[1]), 2, World(0, 1, 0, 1, torch.device("cpu")))
older = store.save(1, tensors(1), {}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
try:
    store.save(2, {"large": torch.zeros(10_000_000)}, {}, {})
except TrainingError as error:
    print(error)
assert store.newest() == older
"""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and "it needs 40.0 MB" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def _two_ranks(tmp_path: Path, code: str, *arguments: str) -> list[str]:
    """Runs `code` on two gloo ranks and gives what each wrote to its file."""
    script = tmp_path / "script.py"
    script.write_text(COMMON + 'with joined("cpu", 60) as world:\n' + code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    # A script runs with its own directory on the path, not with the working directory.
    environment = {**os.environ, "PYTHONPATH": str(Path(llmtrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [(tmp_path / f"out-{rank}").read_text() for rank in range(2)]


def test_two_ranks_save_load_and_fail_together(tmp_path: Path) -> None:
    code = """
    store = CheckpointStore(Path(sys.argv[1]) / "checkpoints", 2, world)
    own = {"own": torch.tensor(world.rank)}
    said = []
    for step in (1, 2, 3):
        path = store.save(step, tensors(step, world.rank), own, {"by": world.rank})
    assert store.newest() == path
    loaded = store.load(path)
    assert loaded.step == 3 and loaded.world_size == 2 and loaded.state == {"by": 0}
    assert loaded.rank_tensors["own"].item() == world.rank
    for rank in (0, 1):
        for name, tensor in tensors(3, rank).items():
            assert torch.equal(loaded.tensors[name], tensor)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:  # whose disk then fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        store.save(4, tensors(4, world.rank), own, {})
    except TrainingError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.newest() == path
    (Path(sys.argv[1]) / f"out-{world.rank}").write_text("".join(said))
"""
    said = _two_ranks(tmp_path, code)
    assert said[0] == said[1] != ""
    assert "step-00000004 could not be written: rank 1: [Errno 27] File too large" in said[0]
    assert "it needs 4.0 MB" in said[0]  # over both ranks
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]
    # And one rank reads the state of both, with no generators of its own.
    store = CheckpointStore(tmp_path / "checkpoints", 2, ALONE)
    newest = store.newest()
    assert newest is not None
    loaded = store.load(newest)
    assert loaded.rank_tensors is None and len(loaded.tensors) == 20


def test_a_directory_that_the_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    code = """
    directory = Path(sys.argv[1]) / f"disk-{world.rank}"
    directory.mkdir()
    said = ""
    try:
        CheckpointStore(directory, 2, world).save(1, tensors(1, world.rank), {}, {})
    except TrainingError as error:
        said += str(error) + "|"
    if world.rank == 0:
        shutil.copytree(sys.argv[2], directory / "step-00000002")
    try:
        CheckpointStore(directory, 2, world).newest()
    except InputError as error:
        said += str(error)
    (Path(sys.argv[1]) / f"out-{world.rank}").write_text(said)
"""
    source = _save(CheckpointStore(tmp_path / "source", 2, ALONE), 2)
    for said in _two_ranks(tmp_path, code, str(source)):
        save, newest = said.split("|")
        assert "No such file or directory" in save
        assert "rank 1 does not see the checkpoint that rank 0 sees: manifest.json is missing" in newest
        assert "on a disk that all nodes share" in newest


def test_the_manifest_is_plain_json_with_every_file(tmp_path: Path) -> None:
    path = _save(CheckpointStore(tmp_path, 2, ALONE), 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {"manifest.json"}
