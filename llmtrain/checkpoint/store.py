"""Checkpoints that are whole or not there: written aside, hashed, renamed into place, verified when read.

    checkpoints/step-NNNNNNNN/
        state-rank-NNNNN.safetensors    the runs of elements that a rank writes, its generators among them
        tensors.json                    of every tensor: dtype, shape, and which file holds which run
        state.json                      the small state
        manifest.json                   size and sha256 of every file above, written last

DCP (torch.distributed.checkpoint) plans, copies and writes in the background; the storage below it
is ours (`storage.py`). A process killed at any moment leaves either no new directory or a whole
one, and a `.writing-...` directory at most, which the next save removes.
"""

import errno
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import llmtrain
from llmtrain.checkpoint.files import (
    FileRecord,
    problem_with,
    readable_bytes,
    write_bytes,
)
from llmtrain.checkpoint.flat import FlatLoadPlanner, FlatSavePlanner, Run, own_runs
from llmtrain.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    Manifest,
    checkpoints_in,
    layout_problem,
    leftovers_in,
    read_manifest,
    read_state,
    read_tensors,
)
from llmtrain.checkpoint.match import check_same_state, rank_prefix, read_rank_tensors
from llmtrain.checkpoint.retention import best_of, remove, remove_old
from llmtrain.checkpoint.staging import HostCopies
from llmtrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from llmtrain.contracts import Shard
from llmtrain.directories import fsync_path
from llmtrain.distributed import World, broadcast_object, cpu_group, gather_objects, sum_scalars
from llmtrain.errors import InputError, TrainingError, nearest
from llmtrain.recipe.schema import Checkpoint

log = logging.getLogger(__name__)

# DCP says so at each save and load of a single process, where there is nothing else to assume.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Contents:
    """What is saved, beside the shards.

    Attributes:
        rank_tensors: what belongs to this rank alone, and returns to it only.
        state: JSON values; rank 0's are written.
        metrics: held-out figures, for keeping the best; what is not finite is never best.
        engine: what the backend says of itself.
    """

    rank_tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    metrics: Mapping[str, float]
    engine: str


@dataclass(frozen=True)
class Restored:
    """What was read back, beside the shards.

    Attributes:
        step: optimizer steps done when it was saved.
        rank_tensors: this rank's own; None where the number of ranks was another, or it saved none.
        state: the small state, as it was given.
    """

    step: int
    rank_tensors: dict[str, Tensor] | None
    state: dict[str, Any]


@dataclass(frozen=True)
class _Pending:
    writing: Path
    future: Future[Any]
    num_bytes: int


class CheckpointStore:
    """The checkpoints of one run; all ranks call every method in the same order.

    As a context manager it lets the save under way end before the ranks part.
    """

    def __init__(self, directory: Path, spec: Checkpoint, world: World, timeout_seconds: int = 3600):
        """Keeps what `spec` says in `directory`, which all ranks must see."""
        self.directory, self.spec, self.world = directory, spec, world
        # Its own group: saves run beside training, and collectives of one group may not cross.
        self._group = cpu_group(timeout_seconds)
        self._copies = HostCopies()
        self._pending: _Pending | None = None
        self._broken: set[Path] = set()

    # ------------------------------------------------------------------------------------ saving

    def save(self, step: int, shards: Mapping[str, Shard], contents: Contents, *, required: bool = False) -> None:
        """Saves a step; a step already there stays. Training may go on when it returns.

        Args:
            step: optimizer steps done.
            shards: this rank's part of the state; the ranks' make up every tensor.
            contents: the rest.
            required: return only when it is on the disk, and fail where it cannot be.

        Raises:
            TrainingError: on all ranks, if any could not write this one or the asynchronous one
                before it; the older checkpoints are untouched.
        """
        self.wait()
        _check_best(self.spec, contents.metrics)
        target = self.directory / f"step-{step:08d}"
        if self._problem(target) is None:
            return
        writing = self.directory / f".writing-{target.name}"
        runs = own_runs(shards) | {
            f"{rank_prefix(self.world.rank)}{name}": Run(tensor.detach().reshape(-1), 0, tuple(tensor.shape))
            for name, tensor in contents.rank_tensors.items()
        }
        planner = FlatSavePlanner(runs)
        publish = self._publisher(writing, target, step, contents, planner)
        arguments: dict[str, Any] = {
            "storage_writer": SafetensorsWriter(writing, self.world.rank, lambda: self._prepare(writing), publish),
            "planner": planner,
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        # As one entry: DCP looks at each and logs it, which holds training up for 30 us a tensor.
        values = {"runs": {name: run.values for name, run in runs.items()}}
        num_bytes = sum(run.values.nbytes for run in runs.values())
        if self.spec.asynchronous and not required:
            future = async_save(values, async_stager=self._copies, **arguments)
            assert isinstance(future, Future)
            self._pending = _Pending(writing, future, num_bytes)
            return
        with self._failures(writing, num_bytes, required):
            save(values, **arguments)

    def wait(self, *, required: bool = False) -> None:
        """Returns when no save is under way; raises what went wrong with the one that was."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._failures(pending.writing, pending.num_bytes, required):
                pending.future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._pending is not None:
            # What it saves is from before the error, and the newest there is. The other ranks' threads write
            # on whatever became of their training; where a rank is gone, its connection is closed.
            lost = self._pending.future.exception()
            name = _step_name(self._pending.writing)
            if lost is not None and not (self.directory / name).exists():  # rank 0 may have had all it waited for
                reason = _reasons(_failures_in(lost)) if isinstance(lost, CheckpointException) else lost
                log.warning("checkpoint %s, under way when the run failed, is lost: %s", name, reason)

    def _prepare(self, writing: Path) -> None:
        for leftover in leftovers_in(self.directory):
            try:
                shutil.rmtree(leftover)
            except OSError as error:  # as NFS does while another node has a file of it open
                log.warning("%s, left by an interrupted save or removal, could not be removed: %s", leftover, error)
        if not self.directory.exists():
            self.directory.mkdir(parents=True)
            fsync_path(self.directory.parent)
        writing.mkdir()

    def _publisher(
        self, writing: Path, target: Path, step: int, contents: Contents, planner: FlatSavePlanner
    ) -> Callable[[dict[str, FileRecord]], None]:
        """What rank 0 does when every rank has written; what it needs of `contents` is copied here."""
        state = json.dumps(dict(contents.state), allow_nan=False).encode()
        metrics = {name: float(value) for name, value in contents.metrics.items() if math.isfinite(value)}
        now, engine = datetime.now(UTC).isoformat(timespec="seconds"), contents.engine

        def publish(files: dict[str, FileRecord]) -> None:
            for name, record in files.items():
                # Another rank's file that does not arrive here means that the disk is not shared.
                if (size := (writing / name).stat().st_size) != record.bytes:
                    raise OSError(f"{name} has {size} bytes where its rank wrote {record.bytes}")
            layout = json.dumps({name: record.model_dump() for name, record in planner.tensors.items()}).encode()
            files = files | {
                STATE: write_bytes(writing / STATE, state),
                TENSORS: write_bytes(writing / TENSORS, layout),
            }
            manifest = Manifest(
                format=FORMAT,
                step=step,
                time=now,
                metrics=metrics,
                world_size=self.world.size,
                engine=engine,
                llmtrain=llmtrain.__version__,
                torch=torch.__version__,
                files=files,
            )
            write_bytes(writing / MANIFEST, manifest.model_dump_json(indent=1).encode())
            fsync_path(writing)
            if target.exists():  # a broken one, or it would have stayed
                remove(target)
            writing.rename(target)
            fsync_path(self.directory)
            self._broken.discard(target)
            remove_old(self.directory, self.spec, self._broken)

        return publish

    @contextmanager
    def _failures(self, writing: Path, num_bytes: int, required: bool) -> Iterator[None]:
        """Says in the user's terms, on all ranks alike, why a save failed."""
        try:
            yield
            return
        except CheckpointException as error:
            failures = _failures_in(error)
            if not all(isinstance(failure, OSError) for failure in failures.values()):
                raise RuntimeError(str(error)) from error
        if self.world.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        message = self._told(writing, sum_scalars([num_bytes])[0], failures)
        full = all(isinstance(failure, OSError) and failure.errno in _NO_ROOM for failure in failures.values())
        if required or not full or self.spec.on_full_disk == "fail":
            raise TrainingError(message)
        if self.world.is_main:
            log.warning("%s\n  checkpoint.on_full_disk is continue: the run goes on without it", message)

    def _told(self, writing: Path, needed: float, failures: Mapping[int, BaseException]) -> str:
        existing = next(parent for parent in (self.directory, *self.directory.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"checkpoint {_step_name(writing)} could not be written: {_reasons(failures)}\n"
            f"  its tensors take {readable_bytes(needed)}, and its directory and the file system some more; with the "
            f"attempt removed {readable_bytes(free)} are free in {existing}\n"
            f"  older checkpoints are untouched: make room (or lower checkpoint.keep, now {self.spec.keep}) and run "
            "the same command again to go on from the newest"
        )

    # ----------------------------------------------------------------------------------- reading

    def newest(self) -> Path | None:
        """The newest checkpoint of which every file is as it was written; None without any.

        Raises:
            InputError: a rank does not see what rank 0 sees.
        """
        candidates = broadcast_object([path.name for path in checkpoints_in(self.directory)])  # rank 0's
        if self.world.is_main:
            for leftover in leftovers_in(self.directory):
                log.warning("%s is what an interrupted save or removal left; the next save removes it", leftover)
        return self._first_whole(self.directory / name for name in candidates)

    def best(self) -> Path | None:
        """The whole checkpoint with the best held-out figure (`checkpoint.keep_best`); None where none has it."""
        assert self.spec.keep_best is not None
        found = {path: read_manifest(path)[0] for path in checkpoints_in(self.directory)}
        metrics = {path: manifest.metrics for path, manifest in found.items() if manifest is not None}
        candidates = []
        while (path := best_of(metrics, self.spec.keep_best)) is not None:
            candidates.append(path.name)
            del metrics[path]
        return self._first_whole(self.directory / name for name in broadcast_object(candidates))

    def _first_whole(self, candidates: Iterable[Path]) -> Path | None:
        for path in candidates:
            problem = self._problem(path)
            if problem is None:
                return path
            self._broken.add(path)
            if self.world.is_main:
                log.warning("checkpoint %s is passed over: %s", path, problem)
        return None

    def restore(self, path: Path, shards: Mapping[str, Shard]) -> Restored:
        """Reads a checkpoint that `newest` gave into `shards`, whatever layout it was saved on.

        Raises:
            InputError: on all ranks: the state is not that of these shards' model and optimizer, or
                cannot be read.
        """
        manifest, problem = read_manifest(path)
        if manifest is None:
            raise InputError(f"no readable checkpoint: {problem}", where=str(path))
        tensors = read_tensors(path)
        check_same_state(path, tensors, shards)
        try:
            load(
                {},
                storage_reader=SafetensorsReader(path, tensors),
                planner=FlatLoadPlanner(shards),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            raise InputError(
                f"the checkpoint cannot be read: {_reasons(_failures_in(error))}",
                where=str(path),
                remedy="move it out of the run directory to go on from an older one",
            ) from error
        same_ranks = manifest.world_size == self.world.size
        # A checkpoint that was converted has none.
        own = read_rank_tensors(path, tensors, self.world.rank) or None if same_ranks else None
        return Restored(manifest.step, own, read_state(path))

    def _problem(self, path: Path) -> str | None:
        """Why the checkpoint is not whole, or None if it is. The ranks share the hashing."""
        manifest, problem = read_manifest(path)
        digest = None if manifest is None else sha256(manifest.model_dump_json().encode()).hexdigest()
        seen = gather_objects((problem, digest))
        main_problem, main_digest = seen[0]
        if main_problem is not None:
            return main_problem
        for rank, (its_problem, its_digest) in enumerate(seen):
            if its_digest != main_digest:
                raise InputError(
                    f"rank {rank} does not see the checkpoint that rank 0 sees: {its_problem or 'it sees another'}",
                    where=str(path),
                    remedy="put the run directory (output_dir) on a disk that all nodes share",
                )
        assert manifest is not None
        largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
        problems = [
            found
            for name in largest_first[self.world.rank :: self.world.size]
            if (found := problem_with(path / name, manifest.files[name])) is not None
        ]
        problem = next((found for share in gather_objects(problems) for found in share), None)
        return problem or broadcast_object(layout_problem(path, manifest) if self.world.is_main else None)


def _check_best(spec: Checkpoint, metrics: Mapping[str, float]) -> None:
    if spec.keep_best is not None and metrics and spec.keep_best.metric not in metrics:
        raise InputError(
            f"there is no held-out figure {spec.keep_best.metric!r}{nearest(spec.keep_best.metric, metrics)}",
            where="checkpoint.keep_best.metric",
            remedy=f"use one of {', '.join(sorted(metrics))}",
        )


def _step_name(writing: Path) -> str:
    return writing.name.removeprefix(".writing-")


def _failures_in(error: CheckpointException) -> dict[int, BaseException]:
    return {rank: failure for rank, (failure, _) in error.failures.items()}


def _reasons(failures: Mapping[int, BaseException]) -> str:
    return "; ".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items()))
