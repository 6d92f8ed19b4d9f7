"""Directories that are built once, by one process, and are whole or not there.

A builder holds a lock that the system releases when it dies, writes into a directory aside, puts
manifest.json there last, syncs, and renames. So a killed build leaves nothing that is taken for
whole; the next builder removes what dead ones left.
"""

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmtrain.data.hashing import hash_file
from llmtrain.errors import TrainingError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ASIDE = ".partial-"
SECONDS_BEFORE_SAYING_SO = 2.0

Build = Callable[[Path], Mapping[str, Any]]


def build_once(path: Path, what: str, build: Build) -> dict[str, Any]:
    """Makes sure that `path` is a whole directory, and returns what its builder said about it.

    Args:
        path: where it shall be; several processes may ask for it at the same time.
        what: names it in messages.
        build: writes files (no subdirectories) into the empty directory that it is given, and
            returns JSON values to remember.
    """
    about = read_about(path)
    if about is not None:
        return about
    path.parent.mkdir(parents=True, exist_ok=True)
    with _acquired(_lock_of(path), what):
        about = read_about(path)  # another process may have built it meanwhile
        if about is not None:
            return about
        _remove_leftovers(path)
        return _build(path, what, build)


def read_about(path: Path) -> dict[str, Any] | None:
    """What the builder said, or None unless the directory is whole: all files, as they were written.

    A file is hashed again only if it changed after the manifest, which was written last: a corpus of
    terabytes is not read at each start.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        written = (path / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is no manifest; it will be built again", path / MANIFEST)
        return None
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            log.warning("%s has %s bytes where %d were written; it will be built again", file, size, entry["bytes"])
            return None
        if file.stat().st_mtime_ns > written and hash_file(file) != entry["blake2b"]:
            log.warning("%s was changed since it was written; it will be built again", file)
            return None
    about: dict[str, Any] = manifest["about"]
    return about


def _build(path: Path, what: str, build: Build) -> dict[str, Any]:
    aside = path.with_name(f"{path.name}{ASIDE}{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        about: dict[str, Any] = json.loads(json.dumps(build(aside)))  # as a later reader sees it
        files = sorted(file for file in aside.iterdir())
        entries = {file.name: {"bytes": file.stat().st_size, "blake2b": hash_file(file)} for file in files}
        manifest = aside / MANIFEST
        manifest.write_text(json.dumps({"about": about, "files": entries}, indent=1))
        for file in [*files, manifest, aside]:
            _sync(file)
        if path.exists():  # it is not whole, or nobody would build
            shutil.rmtree(path)
        os.rename(aside, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(f"no space left for the {what} in {path.parent}") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already unless the build failed
    return about


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_of(path: Path) -> FileLock:
    return FileLock(f"{path}.lock")


def _acquired(lock: FileLock, what: str) -> AbstractContextManager[Any]:
    """The lock, released when left as a context; says so when it takes a while."""
    try:
        return lock.acquire(timeout=SECONDS_BEFORE_SAYING_SO)
    except Timeout:
        log.info("waiting for another process that builds the %s", what)
        return lock.acquire()


def _remove_leftovers(path: Path) -> None:
    """Removes what dead builders left, of this directory (its lock is held) and of its neighbours."""
    for leftover in path.parent.glob(f"*{ASIDE}*"):
        owner = leftover.with_name(leftover.name.split(ASIDE)[0])
        if owner == path:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        try:
            with _lock_of(owner).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except Timeout:
            continue  # its builder lives
