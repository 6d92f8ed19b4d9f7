"""Training states made by hand, and processes that save and load them."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtrain
from llmtrain.checkpoint.store import CheckpointStore, Contents, Restored
from llmtrain.contracts import Shard
from llmtrain.distributed import World
from llmtrain.recipe.schema import Checkpoint

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def tensors(step: int, rows: int = 16) -> dict[str, Tensor]:
    """Of every kind that a training state holds; some parts of one memory, all contiguous."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(rows, 8, generator=generator)
    return {
        "policy/model.embedding": weight,
        "policy/model.head": weight,  # tied
        "policy/model.part": weight[2:5],
        "policy/model.half": weight.bfloat16(),
        "policy/optimizer.moment": torch.randn(8, rows, generator=generator),
        "policy/optimizer.step": torch.tensor(float(step)),
        "policy/counts": torch.randint(-(2**62), 2**62, (5, 3), generator=generator),
        "policy/mask": torch.rand(7, generator=generator) < 0.5,
        "policy/nothing": torch.zeros(0, 4),
        "policy/large": torch.randn(70_001, generator=generator),
    }


def whole(state: Mapping[str, Tensor], replica: int = 0, replicas: int = 1) -> dict[str, Shard]:
    """Shards of a rank that holds all of it."""
    return {name: Shard(tensor, 0, tuple(tensor.shape), replica, replicas) for name, tensor in state.items()}


def cut(state: Mapping[str, Tensor], cuts: Mapping[str, Sequence[int]], rank: int) -> dict[str, Shard]:
    """Shards of one of several ranks, copied; `cuts` are the flat positions of each tensor where they begin and end."""
    shards = {}
    for name, tensor in state.items():
        start, end = cuts[name][rank : rank + 2]
        shards[name] = Shard(tensor.reshape(-1)[start:end].clone(), start, tuple(tensor.shape))
    return shards


def random_cuts(state: Mapping[str, Tensor], ranks: int, seed: int) -> dict[str, list[int]]:
    """Positions for `cut`, anywhere; some shards are empty."""
    chooser = random.Random(seed)
    cuts = {}
    for name, tensor in state.items():
        inner = sorted(chooser.randint(0, tensor.numel()) for _ in range(ranks - 1))
        cuts[name] = [0, *inner, tensor.numel()]
    return cuts


def blank(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The same shards with nothing in them yet: what a checkpoint is read into."""
    ones = {name: torch.ones_like(shard.local).contiguous() for name, shard in shards.items()}
    return {name: shard._replace(local=ones[name]) for name, shard in shards.items()}


def assert_same_bytes(read: Mapping[str, Shard], expected: Mapping[str, Shard]) -> None:
    assert read.keys() == expected.keys()
    for name, shard in expected.items():
        same = torch.equal(_bytes(read[name].local), _bytes(shard.local))
        assert same and read[name].local.dtype == shard.local.dtype, name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def size(shape: Sequence[int]) -> int:
    return prod(shape)


def store_in(directory: Path, world: World = ALONE, **spec: Any) -> CheckpointStore:
    return CheckpointStore(directory, Checkpoint.model_validate(spec), world, 60)


def contents(step: int, **metrics: float) -> Contents:
    own = {"own": torch.tensor(step), "empty": torch.zeros(0)}
    return Contents(own, {"tokens": step * 7, "deep": [{"a": 0.1}]}, metrics, "by hand")


def save(store: CheckpointStore, step: int, *, required: bool = False, **metrics: float) -> Path:
    """A whole checkpoint of `tensors(step)`; on the disk when it returns."""
    store.save(step, whole(tensors(step)), contents(step, **metrics), required=required)
    store.wait()
    return store.directory / f"step-{step:08d}"


def assert_holds(store: CheckpointStore, path: Path, step: int) -> Restored:
    """Reads it back and compares every byte."""
    expected = whole(tensors(step))
    shards = blank(expected)
    restored = store.restore(path, shards)
    assert restored.step == step and restored.state == {"tokens": step * 7, "deep": [{"a": 0.1}]}
    assert_same_bytes(shards, expected)
    return restored


def reseal(path: Path) -> None:
    """Makes the manifest say that the files are as they should be."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk of 20 MB; the test is skipped where none can be made."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a 20 MB tmpfs is refused; runs as root with CAP_SYS_ADMIN")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


COMMON = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from llmtrain.checkpoint.store import CheckpointStore, Contents
from llmtrain.contracts import Shard
from llmtrain.distributed import World, joined, sum_scalars
from llmtrain.errors import InputError, TrainingError
from tests.unit.checkpoint.states import *
directory = Path(sys.argv[1])
"""


def environment(**more: str) -> dict[str, str]:
    """For a process that runs `COMMON` and what follows it."""
    return os.environ | {"PYTHONPATH": str(Path(llmtrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"} | more


def start_alone(directory: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMON + code, str(directory), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment())


def run_alone(directory: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` after `COMMON` in a process of its own."""
    with start_alone(directory, code, *arguments) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_ranks(directory: Path, ranks: int, code: str, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs `code` on gloo ranks, as the body of `with joined(...) as world`; what became of each.

    No launcher: it would end the ranks that live when one dies.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", f'{COMMON}with joined("cpu", 60) as world:\n{code}', str(directory), *arguments]
    processes = []
    for rank in range(ranks):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        own = environment(**of_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own))
    done = []
    for process in processes:
        out, err = process.communicate()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def assert_all_done(done: Sequence[subprocess.CompletedProcess[str]]) -> None:
    failed = [f"rank {rank}: {one.stderr[-3000:]}" for rank, one in enumerate(done) if one.returncode != 0]
    assert not failed, "\n".join(failed)
