"""Checkpoints of several ranks under real faults: disks that fill up or are not shared, ranks that fail or vanish."""

import signal
from pathlib import Path

import pytest

from tests.unit.checkpoint.states import assert_all_done, run_alone, run_ranks, save, small_disk, store_in

FAIL_TOGETHER = """
    shared = directory / "checkpoints"
    said = []

    def attempt(action):
        try:
            action()
        except (TrainingError, InputError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("no error")

    def mine(step):
        return {f"policy/{rank}": Shard(torch.full((1000,), float(step)), 0, (1000,)) for rank in [world.rank]}

    for asynchronous in (False, True):
        store = store_in(shared, world, asynchronous=asynchronous, keep=3)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step in (1, 2, 3):
            store.save(step + 10 * asynchronous, mine(step), contents(step))
        store.wait()
        path = store.newest()
        assert path.name == f"step-{3 + 10 * asynchronous:08d}"

        def save_and_wait(step, shards):
            store.save(step, shards, contents(step))
            store.wait()

        # The disk of one rank fails.
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        attempt(lambda: save_and_wait(50, mine(4)))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        # Shards that overlap, leave a gap, or are not of one kind.
        length = 10 - 3 * world.rank
        for shard in (
            Shard(torch.zeros(6), 4 * world.rank, (10,)),
            Shard(torch.zeros(4), 6 * world.rank, (10,)),
            Shard(torch.zeros(5, dtype=(torch.float32, torch.float16)[world.rank]), 5 * world.rank, (10,)),
        ):
            attempt(lambda shard=shard: save_and_wait(51, {"policy/w": shard}))
        assert store.newest() == path
        # One rank wants another tensor than the checkpoint has.
        wanted = {name: Shard(torch.zeros(1000 + world.rank), 0, (1000 + world.rank,)) for name in mine(3)}
        attempt(lambda: store.restore(path, wanted))
        # A rank may have no part of a tensor, but some rank must.
        attempt(lambda: store.restore(path, mine(0) if world.rank == 0 else {}))
        # A file that is not what tensors.json says, and belongs to one rank.
        broken = shared.parent / f"broken-{asynchronous}" / path.name
        if world.is_main:
            shutil.copytree(path, broken)
            from llmtrain.checkpoint.files import write_tensors
            write_tensors(broken / "state-rank-00001.safetensors", {"policy/1": torch.zeros(1)})
        torch.distributed.barrier()
        attempt(lambda: store.restore(broken, mine(0)))
        # And all is well again.
        read = mine(0)
        restored = store.restore(path, read)
        assert all((shard.local == 3).all() for shard in read.values())
        assert restored.rank_tensors["own"].item() == 3
    (directory / f"out-{world.rank}").write_text("|".join(said))
"""


def test_two_ranks_save_and_fail_together(tmp_path: Path) -> None:
    assert_all_done(run_ranks(tmp_path, 2, FAIL_TOGETHER))
    said = [(tmp_path / f"out-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    for disk, overlap, gap, kinds, other, missing, broken in zip(*[iter(said[0].split("|"))] * 7, strict=True):
        assert disk.startswith("TrainingError: checkpoint step-00000050 could not be written: rank 1: [Errno 27]")
        assert "its tensors take 8.0 kB" in disk  # over both ranks
        assert overlap.startswith("RuntimeError: ") and "rank 1 saves element 4, which another one saves" in overlap
        assert gap.startswith("RuntimeError: ") and "policy/w: no rank saves elements 4 to 5" in gap
        assert kinds.startswith("RuntimeError: ") and "rank 1 says that it is F16 of shape [10]" in kinds
        assert other.startswith("InputError: ") and "for policy/1 it holds F32 of shape [1000], and the run" in other
        assert missing.startswith("InputError: ") and "it holds policy/1, which the run has not" in missing
        assert (
            broken.startswith("InputError: ") and "rank 1: " in broken and "does not hold what tensors.json" in broken
        )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[-3:] == ["step-00000011", "step-00000012", "step-00000013"]


FULL_DISK = """
    said = []
    store = store_in(directory / "checkpoints", world, on_full_disk="continue")
    big = {f"policy/{world.rank}": Shard(torch.zeros(4_000_000), 0, (4_000_000,))}
    small = {f"policy/{world.rank}": Shard(torch.ones(1000), 0, (1000,))}
    store.save(1, small, contents(1))
    store.save(2, big, contents(2))  # 16 MB a rank: one of them fits
    store.save(3, small, contents(3))
    store.wait()
    assert store.newest().name == "step-00000003"
    for spec, required in (({"on_full_disk": "continue"}, True), ({"asynchronous": False}, False), ({}, False)):
        store = store_in(directory / "checkpoints", world, **spec)
        try:
            store.save(4, big, contents(4), required=required)
            store.wait()
        except TrainingError as error:
            said.append(str(error))
    store.save(5, small, contents(5), required=True)
    assert store.newest().name == "step-00000005"
    print("|".join(said))
"""


def test_a_disk_full_for_two_ranks(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        done = run_ranks(disk, 2, FULL_DISK)
        assert_all_done(done)
        assert done[0].stdout == done[1].stdout
        required, synchronous, asynchronous = done[0].stdout.split("|")
        for text in (required, synchronous, asynchronous):
            assert "step-00000004 could not be written" in text and "No space left on device" in text
            assert "its tensors take 32.0 MB" in text
        assert "step-00000002 could not be written" in done[0].stderr  # said by one rank
        assert "step-00000002" not in done[1].stderr and "the run goes on without it" in done[0].stderr
        assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["step-00000003", "step-00000005"]


def test_a_directory_that_the_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    code = """
    own = directory / f"disk-{world.rank}"
    own.mkdir()
    shards = {f"policy/{world.rank}": Shard(torch.zeros(10), 0, (10,))}
    said = ""
    for asynchronous in (False, True):
        store = store_in(own, world, asynchronous=asynchronous)
        try:
            store.save(1, shards, contents(1))
            store.wait()
        except TrainingError as error:
            said += str(error) + "|"
    # The disk that rank 1 sees has a directory of that name, and rank 0 does not see what is written there.
    if world.rank == 1:
        (own / ".writing-step-00000001").mkdir()
    try:
        store.save(1, shards, contents(1), required=True)
    except TrainingError as error:
        said += str(error) + "|"
    if world.rank == 0:
        shutil.copytree(sys.argv[2], own / "step-00000002")
    try:
        store.newest()
    except InputError as error:
        said += str(error)
    (directory / f"out-{world.rank}").write_text(said)
"""
    source = save(store_in(tmp_path / "source"), 2)
    assert_all_done(run_ranks(tmp_path, 2, code, str(source)))
    for rank in range(2):
        *saves, newest = (tmp_path / f"out-{rank}").read_text().split("|")
        assert len(saves) == 3
        assert all("could not be written: rank 1: [Errno 2] No such file" in text for text in saves[:2])
        assert "could not be written: rank 0: [Errno 2] No such file" in saves[2]
        assert "rank 1 does not see the checkpoint that rank 0 sees: manifest.json is missing" in newest
        assert "on a disk that all nodes share" in newest


# ------------------------------------------------------------------- a save under way when a run ends

FAIL_WHILE_SAVING = """
    length = 10_000_000
    with store_in(directory / "checkpoints", world) as store:
        store.save(1, {f"policy/{world.rank}": Shard(torch.ones(length), 0, (length,))}, contents(1))
        pending = time.monotonic()
        if str(world.rank) in sys.argv[2]:
            raise ValueError("the training failed")
        sum_scalars([1.0])  # with the rank that is gone
"""


@pytest.mark.parametrize("failing", ["01", "1", "0"], ids=["both", "one", "the first"])
def test_a_run_that_fails_ends_when_its_save_has_ended(tmp_path: Path, failing: str) -> None:
    done = run_ranks(tmp_path, 2, FAIL_WHILE_SAVING, failing)
    assert [one.returncode for one in done] == [1, 1]
    for rank in map(int, failing):
        assert "ValueError: the training failed" in done[rank].stderr
    newest = store_in(tmp_path / "checkpoints").newest()
    assert newest is not None and newest.name == "step-00000001"


def test_a_process_that_fails_ends_when_its_save_has_ended(tmp_path: Path) -> None:
    code = """
with store_in(directory) as store:
    store.save(1, {"policy/w": Shard(torch.ones(10_000_000), 0, (10_000_000,))}, contents(1))
    sys.exit(75)
"""
    done = run_alone(tmp_path, code)
    assert done.returncode == 75 and not done.stderr
    assert store_in(tmp_path).newest() == tmp_path / "step-00000001"


def test_a_rank_that_is_killed_while_saving_ends_the_others(tmp_path: Path) -> None:
    code = """
    store = store_in(directory, world)
    small = {f"policy/{world.rank}": Shard(torch.ones(10), 0, (10,))}
    store.save(1, small, contents(1), required=True)
    length = 30_000_000 if world.rank == 0 else 10
    store.save(2, {f"policy/{world.rank}": Shard(torch.ones(length), 0, (length,))}, contents(2))
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    store.wait()
"""
    killed, other = run_ranks(tmp_path, 2, code)
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode == 1 and "RuntimeError" in other.stderr
    newest = store_in(tmp_path).newest()
    assert newest is not None and newest.name == "step-00000001"
