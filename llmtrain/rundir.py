"""The directory of one run: claimed before anything is trained, by one live process group at a time.

runs/<name>/
    recipe.resolved.yaml    the recipe of the run, written when it first trains; its identity guards the rest
    starts.jsonl            one object a start: when, where, versions, from which step
    verdict.json            how the newest start ended
    metrics.jsonl  samples.jsonl  checkpoints/  tensorboard/  logs/rank-N.log
    reference.safetensors   log-probabilities under the reference, of algorithms that need them
    final/                  the exported model; there only when it is complete
    .lock  .lock-holder     held while a run is alive, and by whom
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from llmtrain.algorithms.reference import FILE as REFERENCE
from llmtrain.checkpoint.files import written_aside
from llmtrain.directories import new_directory
from llmtrain.distributed import World, broadcast_object, gather_objects
from llmtrain.errors import InputError
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.resolved import RESOLVED, environment, identity, identity_differences, resolved_dump
from llmtrain.recipe.schema import Recipe

_LOCK, _HOLDER = ".lock", ".lock-holder"
# What is there of a run that never began to train: another recipe may take its place.
_BEFORE_TRAINING = frozenset(
    {_LOCK, _HOLDER, "logs"}
    | {f"{aside}{name}" for name in (RESOLVED, "verdict.json", REFERENCE) for aside in ("", ".writing-")} - {RESOLVED}
)
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a claimed run; rank 0 holds its lock until `release` or the end of the process."""

    path: Path
    world: World
    lock: FileLock | None

    @property
    def recipe(self) -> Path:
        return self.path / RESOLVED

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def is_finished(self) -> bool:
        """Whether the model was exported, which is the last thing a run does."""
        return self.final.is_dir()

    @contextmanager
    def writing_final(self) -> Iterator[Path]:
        """A directory for rank 0 to write the model into; it becomes final/ if nothing was raised."""
        again = "make room, and run the same command again; it goes on from the last checkpoint"
        with new_directory(self.final, where=str(self.path), remedy=again) as aside:
            yield aside

    def begin(self, recipe: Recipe, resume_step: int) -> None:
        """Makes the directory that of `recipe`, and appends this start to starts.jsonl (rank 0).

        Called when all that could be refused is past: a mistake that is found before leaves the
        directory free for the mended recipe.
        """
        if not self.world.is_main:
            return
        if not self.recipe.exists():
            with written_aside(self.recipe) as file:
                file.write(_environment_comment() + resolved_dump(recipe))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"time": now, "resume_step": resume_step, "world_size": self.world.size, **environment()}
        with (self.path / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def release(self) -> None:
        """Lets another process claim the directory."""
        if self.lock is not None:
            self.lock.release()


def claim(directory: Path, recipe: Recipe, world: World) -> RunDirectory:
    """Makes `directory` the place of this run, or of its continuation. All ranks call it.

    A refusal touches nothing that is there.

    Raises:
        InputError: on all ranks: it cannot be written, is no run of ours, is that of another recipe
            or in use by another process, or a rank does not see it.
    """
    lock, failure = None, None
    if world.is_main:
        try:
            lock = _claim_alone(directory, recipe)
        except InputError as error:
            failure = (error.message, error.where, error.remedy)
    failure = broadcast_object(failure)
    if failure is not None:
        message, where, remedy = failure
        raise InputError(message, where=where, remedy=remedy)
    run = RunDirectory(directory, world, lock)
    holders = gather_objects(_holder(directory))
    for rank, holder in enumerate(holders):
        if holder != holders[0]:
            run.release()
            raise InputError(
                f"rank {rank} does not see the run directory that rank 0 sees",
                where=str(directory),
                remedy="put it (output_dir) on a disk that all nodes share",
            )
    return run


def _claim_alone(directory: Path, recipe: Recipe) -> FileLock:
    with ExitStack() as undo:
        try:
            _check(directory, recipe)
            directory.mkdir(parents=True, exist_ok=True)
            lock = _locked(directory)
            undo.callback(lock.release)
            _check(directory, recipe)  # again: before the lock, another process may have begun a run here
        except OSError as error:
            raise InputError(
                f"the run directory cannot be written: {error.strerror}",
                where=str(directory),
                remedy="make room or get permission to write there, or give another output_dir=...",
            ) from None
        undo.pop_all()
    return lock


def _check(directory: Path, recipe: Recipe) -> None:
    """Raises InputError unless `directory` is absent, empty, or a run of this recipe."""
    if not directory.exists():
        return
    another = "give another name=..., or delete the directory"
    if not directory.is_dir():
        raise InputError("the run directory is a file", where=str(directory), remedy=another)
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise InputError(f"the run directory cannot be read: {error.strerror}", where=str(directory)) from None
    if RESOLVED not in names:
        if names - _BEFORE_TRAINING:
            raise InputError(
                f"the run directory holds files and is no run of llmtrain: it has no {RESOLVED}",
                where=str(directory),
                remedy="give another name=... or output_dir=...",
            )
        return
    try:
        old = load_recipe(directory / RESOLVED).recipe
    except InputError as error:
        raise InputError(
            f"the recipe of the run that is there cannot be read: {error}",
            where=str(directory),
            remedy=f"correct it in {RESOLVED}, {another}",
        ) from None
    differences = identity_differences(identity(old), identity(recipe))
    if differences:
        shown = [f"{key} was {was!r}, now {now!r}" for key, was, now in differences[:_SHOWN_DIFFERENCES]]
        if len(differences) > _SHOWN_DIFFERENCES:
            shown.append(f"and {len(differences) - _SHOWN_DIFFERENCES} more")
        raise InputError(
            f"the directory holds another recipe's run: {'; '.join(shown)}", where=str(directory), remedy=another
        )


def _locked(directory: Path) -> FileLock:
    lock = FileLock(directory / _LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        who = _holder(directory) or "a process that has just started"
        raise InputError(
            f"the run directory is in use by {who}",
            where=str(directory),
            remedy="wait for it or stop it, or give another name=...",
        ) from None
    (directory / _HOLDER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def _environment_comment() -> str:
    lines = [f"# {name}: {json.dumps(value)}\n" for name, value in environment().items()]
    return "".join(["# Where this run was first started; starts.jsonl has every start.\n", *lines])


def _holder(directory: Path) -> str | None:
    file = directory / _HOLDER
    return file.read_text(encoding="utf-8") if file.is_file() else None
