"""Checkpoints that are whole or not there: written aside, hashed, renamed into place, verified when read.

    checkpoints/step-NNNNNNNN/
        state-rank-NNNNN.safetensors    the shared state; each rank that owns some of it writes its own
        rank-NNNNN.safetensors          what belongs to one rank: its random generators
        state.json                      step, world size, and the small state
        manifest.json                   size and sha256 of every file above, written last

A process killed at any moment leaves either no new directory or a whole one, and a
`.writing-...` directory at most, which the next save removes.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import llmtrain
from llmtrain.checkpoint.files import (
    FileRecord,
    LazyTensors,
    fsync_path,
    problem_with,
    readable_bytes,
    write_bytes,
    write_tensors,
)
from llmtrain.distributed import World, barrier, broadcast_object, gather_objects, sum_scalars
from llmtrain.errors import InputError, TrainingError

log = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST = "manifest.json"
_STATE = "state.json"


class Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1]
    step: int = Field(ge=0)
    llmtrain: str
    torch: str
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read back.

    Attributes:
        step: optimizer steps done when it was saved.
        tensors: the shared state of all ranks, read from the files as it is asked for.
        rank_tensors: this rank's own; None where the world size was another, so that no rank has any.
        state: the small state, as it was given.
        world_size: number of ranks that saved it.
    """

    step: int
    tensors: Mapping[str, Tensor]
    rank_tensors: dict[str, Tensor] | None
    state: dict[str, Any]
    world_size: int


class CheckpointStore:
    """The checkpoints of one run; all ranks call every method in the same order."""

    def __init__(self, directory: Path, keep: int, world: World):
        """Keeps the newest `keep` checkpoints in `directory`, which all ranks must see."""
        self.directory, self.keep, self.world = directory, keep, world
        self._broken: set[Path] = set()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        rank_tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """Saves a step and removes the checkpoints beyond the newest `keep`; a step already there stays.

        Args:
            step: optimizer steps done.
            tensors: what this rank writes of the shared state; a name is given by one rank only.
            rank_tensors: this rank's own.
            state: JSON values; rank 0's are written.

        Raises:
            TrainingError: on all ranks, if any could not write; the older checkpoints are untouched.
        """
        target = self.directory / f"step-{step:08d}"
        if self._problem(target) is None:
            return target
        writing = self.directory / f".writing-{target.name}"
        num_bytes = sum(tensor.nbytes for tensor in (*tensors.values(), *rank_tensors.values()))
        self._on_all_ranks(writing, num_bytes, lambda: self._prepare(writing))
        written = self._on_all_ranks(
            writing, num_bytes, lambda: self._write(writing, step, tensors, rank_tensors, state)
        )
        records = {name: record for share in written for name, record in share.items()}
        self._on_all_ranks(writing, num_bytes, lambda: self._commit(writing, target, step, records))
        self._broken.discard(target)
        if self.world.is_main:
            self._remove_old()
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint of which every file is as it was written; None without any.

        Raises:
            InputError: a rank does not see what rank 0 sees.
        """
        candidates = broadcast_object([path.name for path in self._checkpoints()])  # rank 0's
        if self.world.is_main:
            for leftover in self._leftovers():
                log.warning("%s is what an interrupted save or removal left; the next save removes it", leftover)
        for path in (self.directory / name for name in candidates):
            problem = self._problem(path)
            if problem is None:
                return path
            self._broken.add(path)
            if self.world.is_main:
                log.warning("checkpoint %s is passed over: %s", path, problem)
        return None

    def load(self, path: Path) -> Loaded:
        """Reads a checkpoint that `newest` or `save` gave; the hashes are not checked again."""
        manifest, problem = _read_manifest(path)
        if manifest is None:
            raise InputError(f"no readable checkpoint: {problem}", where=str(path))
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        own = _rank_file(self.world.rank)
        rank_tensors = None
        if state["world_size"] == self.world.size:
            rank_tensors = dict(LazyTensors([path / own])) if own in manifest.files else {}
        shared = [path / name for name in sorted(manifest.files) if name.startswith("state-rank-")]
        return Loaded(state["step"], LazyTensors(shared), rank_tensors, state["state"], state["world_size"])

    def _prepare(self, writing: Path) -> None:
        if self.world.is_main:
            for leftover in self._leftovers():
                shutil.rmtree(leftover)
            writing.mkdir(parents=True)

    def _write(
        self,
        writing: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        rank_tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> dict[str, FileRecord]:
        records = {}
        if tensors:
            name = f"state-{_rank_file(self.world.rank)}"
            records[name] = write_tensors(writing / name, tensors)
        if rank_tensors:
            name = _rank_file(self.world.rank)
            records[name] = write_tensors(writing / name, rank_tensors)
        if self.world.is_main:
            content = {"step": step, "world_size": self.world.size, "state": dict(state)}
            records[_STATE] = write_bytes(writing / _STATE, json.dumps(content, allow_nan=False).encode())
        return records

    def _commit(self, writing: Path, target: Path, step: int, records: dict[str, FileRecord]) -> None:
        if not self.world.is_main:
            return
        for name, record in records.items():
            # Another rank's file that does not arrive here means that the disk is not shared.
            if (size := (writing / name).stat().st_size) != record.bytes:
                raise OSError(f"{name} has {size} bytes where its rank wrote {record.bytes}")
        manifest = Manifest(format=1, step=step, llmtrain=llmtrain.__version__, torch=torch.__version__, files=records)
        write_bytes(writing / MANIFEST, manifest.model_dump_json(indent=1).encode())
        fsync_path(writing)
        if target.exists():  # a broken one, or it would have stayed
            self._remove(target)
        writing.rename(target)
        fsync_path(self.directory)

    def _on_all_ranks(self, writing: Path, num_bytes: int, action: Callable[[], T]) -> list[T]:
        """Every rank's result of `action`; where one failed, all raise instead of waiting for it."""
        outcome: tuple[T | None, str | None]
        try:
            outcome = action(), None
        except OSError as error:
            outcome = None, f"rank {self.world.rank}: {error}"
        outcomes = gather_objects(outcome)
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            needed = sum_scalars([num_bytes])[0]
            raise TrainingError(self._give_up(writing, needed, failures))
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def _give_up(self, writing: Path, needed: float, failures: list[str]) -> str:
        if self.world.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        barrier()
        existing = next(parent for parent in (self.directory, *self.directory.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"checkpoint {writing.name.removeprefix('.writing-')} could not be written: {'; '.join(failures)}\n"
            f"  it needs {readable_bytes(needed)}; {readable_bytes(free)} are free in {existing}\n"
            f"  older checkpoints are untouched: make room (or lower checkpoint.keep, now {self.keep}) and run "
            "the same command again to go on from the newest"
        )

    def _problem(self, path: Path) -> str | None:
        """Why the checkpoint is not whole, or None if it is. The ranks share the hashing."""
        manifest, problem = _read_manifest(path)
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
        return next((found for share in gather_objects(problems) for found in share), None)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), reverse=True)

    def _leftovers(self) -> list[Path]:
        return sorted([*self.directory.glob(".writing-*"), *self.directory.glob(".removing-*")])

    def _remove_old(self) -> None:
        # A broken one does not count, or it would push out the whole one that the run came from.
        whole = [path for path in self._checkpoints() if path not in self._broken]
        oldest_kept = whole[: self.keep][-1]
        for path in self._checkpoints():
            if path >= oldest_kept:
                continue
            try:
                self._remove(path)
            except OSError as error:
                log.warning("old checkpoint %s could not be removed: %s", path, error)

    def _remove(self, path: Path) -> None:
        removing = path.with_name(f".removing-{path.name}")
        path.rename(removing)  # so that a half-removed one is never taken for a checkpoint
        shutil.rmtree(removing)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _read_manifest(path: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, or why there is none."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except OSError as error:
        return None, f"{MANIFEST} cannot be read: {error.strerror}"
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{MANIFEST} is no manifest of ours: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    if path.name != f"step-{manifest.step:08d}":
        return None, f"{MANIFEST} is of step {manifest.step}"
    if _STATE not in manifest.files:
        return None, f"{MANIFEST} lists no {_STATE}"
    return manifest, None
