"""New directories and files that are there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmtrain.errors import InputError, TrainingError


def check_new(output: Path, where: str = "--output") -> None:
    """Raises InputError where `output` is anything but absent or an empty directory."""
    try:
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"{output} is not an empty directory", where=where, remedy="name a new directory")
    except OSError as error:
        raise InputError(f"{output} cannot be read: {error.strerror}", where=where) from None


@contextmanager
def new_directory(
    output: Path, where: str = "--output", remedy: str = "make room, or name another directory"
) -> Iterator[Path]:
    """A directory to write into; it becomes `output` if nothing was raised, and is removed otherwise.

    Args:
        remedy: where it cannot be written.

    Raises:
        InputError: `output` is not empty, or cannot be made.
        TrainingError: the disk is full, or fails, while it is written.
    """
    check_new(output, where)
    output = output.absolute()
    aside = output.with_name(f".writing-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():  # of a process that was killed
            shutil.rmtree(aside)
        aside.mkdir()
    except OSError as error:
        raise InputError(f"{output} cannot be made: {error.strerror}", where=where) from None
    try:
        yield aside
        _give_usual_modes(aside)
        for path in [*aside.rglob("*"), aside]:
            fsync_path(path)
        if output.exists():
            output.rmdir()
        aside.rename(output)
        fsync_path(output.parent)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise TrainingError(f"{output} could not be written: {reason}\n  remedy: {remedy}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is whole.

    Raises:
        TrainingError: the disk is full, or fails.
    """
    aside = path.with_name(f".writing-{path.name}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}\n  remedy: make room, or name another file"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Makes a file's content, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_usual_modes(directory: Path) -> None:
    """safetensors makes files that only their owner can read; these are to be handed on as any others."""
    umask = os.umask(0)  # there is no other way to ask for it
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
