"""New directories and files that are there whole, or not at all."""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
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


def check_new_file(path: Path, where: str = "--output") -> None:
    """Raises InputError where `path` exists, or cannot be made."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists", where=where, remedy="name a new file, or remove it first")
    check_file(path, where)


def check_file(path: Path, where: str = "--output") -> None:
    """Raises InputError where no file can be made, or put in the place of the one that is there.

    That is tried: permissions do not tell of a disk that is only read, or of a name that is too long.
    """
    if not os.path.isdir(path.parent):
        raise InputError(f"no such directory: {path.parent}", where=where, remedy="make it first")
    if os.path.isdir(path):
        raise InputError(f"{path} is a directory", where=where, remedy="name a file")
    tried = _aside(path)
    try:
        tried.touch()
        tried.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be made: {error.strerror}", where=where, remedy="name another file, or get permission"
        ) from None


@contextmanager
def new_files(paths: Sequence[Path], remedy: str = "make room, or name other files") -> Iterator[list[Path]]:
    """Files to write, which appear at `paths` when all of them are whole.

    Args:
        remedy: where they cannot be written.

    Raises:
        TrainingError: the disk is full, or fails; or something else came to be at a path, and is not overwritten: what
            was written stands beside it.
    """
    asides = [_aside(path) for path in paths]
    places: list[Path] = []
    whole = False
    try:
        yield asides
        for aside in asides:
            fsync_path(aside)
        for path in paths:
            places.append(_taken(path))
        for aside, place in zip(asides, places, strict=True):
            aside.replace(place)
        whole = True
    except OSError as error:
        names = ", ".join(map(str, paths))
        raise TrainingError(f"{names} cannot be written: {error.strerror}\n  remedy: {remedy}") from None
    finally:
        for name in asides if whole else [*asides, *places]:
            name.unlink(missing_ok=True)
    moved = [
        f"{path} was made by another while this worked; what was written is in {place}"
        for path, place in zip(paths, places, strict=True)
        if place != path
    ]
    if moved:
        raise TrainingError("\n".join([*moved, "  remedy: take it from there; two commands wrote to one name"]))


def _taken(path: Path) -> Path:
    """The name, or one like it where that is taken, with an empty file that makes it ours.

    Without it, what another makes there meanwhile would be lost in a rename.
    """
    for place in itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))):
        try:
            place.open("x").close()
        except FileExistsError:
            continue
        return place
    raise AssertionError("numbers do not end")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path`, and of what stands there, when it is whole.

    Raises:
        TrainingError: the disk is full, or fails.
    """
    aside = _aside(path)
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}\n  remedy: make room, or name another file"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """What stands for a file until it is whole; of this process alone, since another may write to the same name."""
    return path.with_name(f".writing-{os.getpid()}-{path.name}")


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
