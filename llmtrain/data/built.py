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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmtrain.data.hashing import hash_file, hash_settings
from llmtrain.directories import fsync_path
from llmtrain.errors import InputError, TrainingError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OWN_HASH = "manifest_blake2b"  # of all the rest of it
SMALL_BYTES = 1 << 24  # a file that costs nothing to hash at each start
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

    Raises:
        InputError: another user's cache, which this one may not read or write.
    """
    with permission_told():
        about = read_about(path)
        if about is not None:
            return about
        path.parent.mkdir(parents=True, exist_ok=True)
        with _acquired(_lock_of(path), what):
            about, damage = _read(path)  # another process may have built it meanwhile
            if about is not None:
                return about
            if damage is not None:
                log.warning("%s; the %s will be built again", damage, what)
            _remove_leftovers(path)
            return _build(path, what, build)


@contextmanager
def permission_told() -> Iterator[None]:
    """Raises InputError for what of the cache this user may not read or write."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"the cache holds what is not yours to use: {error.filename}: {error.strerror}",
            where="data.cache_dir",
            remedy="let its owner share it (chmod -R g+rwX), or set data.cache_dir to a directory of your own",
        ) from None


def read_about(path: Path) -> dict[str, Any] | None:
    """What the builder said, or None unless the directory is whole: all files, as they were written.

    A big file is hashed again only if it changed after the manifest, which was written last: a corpus
    of terabytes is not read at each start.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(what the builder said, None), or (None, what is damaged; None where nothing was built)."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        written = file.stat().st_mtime_ns
    except FileNotFoundError:
        return None, None
    except (ValueError, RecursionError, IsADirectoryError):
        return None, f"{file} is no manifest"
    if not isinstance(manifest, dict) or manifest.pop(OWN_HASH, None) != hash_settings(manifest):
        return None, f"{file} is no manifest, or was changed since it was written"
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            return None, f"{file} is missing"
        if size != entry["bytes"]:
            return None, f"{file} has {size} bytes where {entry['bytes']} were written"
        doubtful = size <= SMALL_BYTES or file.stat().st_mtime_ns > written
        if doubtful and hash_file(file) != entry["blake2b"]:
            return None, f"{file} was changed since it was written"
    return manifest["about"], None


def _build(path: Path, what: str, build: Build) -> dict[str, Any]:
    aside = path.with_name(f"{path.name}{ASIDE}{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        about: dict[str, Any] = json.loads(json.dumps(build(aside)))  # as a later reader sees it
        files = sorted(file for file in aside.iterdir())
        entries = {file.name: {"bytes": file.stat().st_size, "blake2b": hash_file(file)} for file in files}
        manifest = aside / MANIFEST
        content = {"about": about, "files": entries}
        manifest.write_text(json.dumps({**content, OWN_HASH: hash_settings(content)}, indent=1))
        for file in [*files, manifest, aside]:
            fsync_path(file)
        if path.exists():  # it is not whole, or nobody would build
            shutil.rmtree(path)
        os.rename(aside, path)
        fsync_path(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(f"no space left for the {what} in {path.parent}") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already unless the build failed
    return about


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
