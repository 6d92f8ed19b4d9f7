"""Saved on some ranks and read on others: real processes, a real store, and shards made by hand."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.manifest import read_tensors
from tests.unit.checkpoint.states import (
    assert_all_done,
    assert_same_bytes,
    blank,
    contents,
    run_ranks,
    store_in,
    tensors,
    whole,
)

READ = """
    state = tensors(9, rows=40)
    for name in sys.argv[2].split(","):
        store = store_in(directory / name, world)
        path = store.newest()
        layouts = [cut(state, random_cuts(state, world.size, seed), world.rank) for seed in (21, 22)]
        for expected in (*layouts, whole(state)):
            read = blank(expected)
            restored = store.restore(path, read)
            assert_same_bytes(read, expected)
            assert restored.step == 9 and restored.state == {"tokens": 63, "deep": [{"a": 0.1}]}
            assert restored.rank_tensors is None
"""

SAVE = """
    def keep(name, shards, asynchronous):
        spec = {"asynchronous": asynchronous, "keep": 1}
        store = store_in(directory / f"{name}-on-{world.size}", world, **spec)
        older = whole(tensors(8), world.rank, world.size)
        store.save(8, older, contents(8))
        store.save(9, shards, contents(9 + world.rank))
        if asynchronous:
            for shard in shards.values():
                shard.local.zero_()  # training goes on
            sums = [sum_scalars([world.rank, step]) for step in range(100)]  # and its collectives too
            assert sums == [[world.size * (world.size - 1) / 2, step * world.size] for step in range(100)]
        store.wait()
        assert store.newest() == directory / f"{name}-on-{world.size}" / "step-00000009"
        read = blank(shards)
        restored = store.restore(store.newest(), read)
        assert restored.rank_tensors["own"].item() == 9 + world.rank and restored.state["tokens"] == 63
        return read

    def fresh():
        return tensors(9, rows=40)

    for asynchronous, kind in ((False, "synchronous"), (True, "asynchronous")):
        positions = random_cuts(fresh(), world.size, seed=3)
        read = keep(f"cut-{kind}", cut(fresh(), positions, world.rank), asynchronous)
        assert_same_bytes(read, cut(fresh(), positions, world.rank))
        read = keep(f"replicated-{kind}", whole(fresh(), world.rank, world.size), asynchronous)
        assert_same_bytes(read, whole(fresh()))
"""

# Two groups that hold the same, each cut between two ranks; and cut among ranks as ZeRO does, tensor by tensor.
SAVE_ON_FOUR = """
    group, member = divmod(world.rank, 2)
    halves = cut(fresh(), random_cuts(fresh(), 2, seed=4), member)
    keep("hybrid", {name: shard._replace(replica=group, replicas=2) for name, shard in halves.items()}, True)
    names = sorted(fresh())
    keep("dealt", {name: whole(fresh())[name] for name in names[world.rank :: world.size]}, True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def on_one(directory: Path) -> list[str]:
    for asynchronous in (False, True):
        with store_in(directory / f"whole-{asynchronous}-on-1", asynchronous=asynchronous) as store:
            store.save(9, whole(tensors(9, rows=40)), contents(9))
    return sorted(path.name for path in directory.glob("whole-*"))


@pytest.fixture(scope="module")
def on_two(directory: Path, on_one: Sequence[str]) -> list[str]:
    """Saved on two ranks, which then read what one saved."""
    _run(directory, 2, SAVE + READ, on_one)
    return sorted(path.name for path in directory.glob("*-on-2"))


@pytest.fixture(scope="module")
def on_four(directory: Path, on_one: Sequence[str], on_two: Sequence[str]) -> list[str]:
    """Saved on four ranks, which then read what one and two saved."""
    _run(directory, 4, SAVE + SAVE_ON_FOUR + READ, [*on_one, *on_two])
    return sorted(path.name for path in directory.glob("*-on-4"))


def _run(directory: Path, ranks: int, code: str, names: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    done = run_ranks(directory, ranks, code, ",".join(names))
    assert_all_done(done)
    return done


def assert_one_reads(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        store = store_in(directory / name)
        path = store.newest()
        assert path is not None and path.name == "step-00000009"
        read = blank(whole(tensors(9, rows=40)))
        assert store.restore(path, read).rank_tensors is None
        assert_same_bytes(read, whole(tensors(9, rows=40)))


def test_two_read_what_one_saved_and_one_what_two_saved(directory: Path, on_two: Sequence[str]) -> None:
    assert on_two == [f"{kind}-{how}-on-2" for kind in ("cut", "replicated") for how in ("asynchronous", "synchronous")]
    assert_one_reads(directory, on_two)


def test_synchronous_and_asynchronous_saves_of_several_ranks_give_the_same_files(
    directory: Path, on_two: Sequence[str]
) -> None:
    for kind in ("cut", "replicated"):
        one, other = (directory / f"{kind}-{how}-on-2" / "step-00000009" for how in ("synchronous", "asynchronous"))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir()) and "state-rank-00001.safetensors" in names
        for name in set(names) - {"manifest.json"}:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_two_replicas_write_half_of_what_is_large(directory: Path, on_two: Sequence[str]) -> None:
    path = directory / "replicated-asynchronous-on-2" / "step-00000009"
    files = [load_file(path / f"state-rank-0000{rank}.safetensors") for rank in range(2)]
    assert [len(file["policy/large"]) for file in files] == [35_000, 35_001]
    records = read_tensors(path)
    shared = {name: record for name, record in records.items() if name.startswith("policy/")}
    for name, tensor in tensors(9, rows=40).items():  # each element once
        written = torch.cat([files[rank][name] for rank in shared[name].ranks])
        assert torch.equal(written, tensor.reshape(-1))
        assert sum(file[name].numel() for file in files if name in file) == tensor.numel()


def test_four_read_what_two_saved_and_one_what_four_saved(directory: Path, on_four: Sequence[str]) -> None:
    assert {name.split("-")[0] for name in on_four} == {"cut", "replicated", "hybrid", "dealt"}
    assert_one_reads(directory, on_four)


def test_two_read_what_four_saved(directory: Path, on_four: Sequence[str]) -> None:
    _run(directory, 2, READ, on_four)
