"""What a source holds, as a hash: the same content with the same settings gives the same cache.

Files are hashed by content. So that a big corpus is not read again at each start, hashes are
remembered in the cache directory by (real path, size, modification time, inode).
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from llmtrain.data import huggingface, python_tree
from llmtrain.data.built import permission_told
from llmtrain.data.files import expand
from llmtrain.data.hashing import hash_file, hash_settings, identity
from llmtrain.recipe.schema import HuggingFaceSource, JSONLSource, ParquetSource, PythonSource, Source, TextSource

log = logging.getLogger(__name__)

# A file written within the clock's resolution of its hashing could change again without its
# modification time changing (git's "racy" index entries); its hash is not remembered.
SETTLED_NANOSECONDS = 2_000_000_000
# By real path: size, modification time and inode, and the hash of the content.
_MEMO = TypeAdapter(dict[str, tuple[list[int], str]])


def fingerprint(source: Source, cache_dir: Path) -> str:
    """Hash of what `read_documents(source)` yields, up to the versions of the reading libraries.

    Raises:
        InputError: as `read_documents` does, where files are missing.
    """
    settings: dict[str, Any] = source.model_dump(exclude={"weight", "path", "paths"})
    if isinstance(source, PythonSource) and source.content != "source":
        settings["python"] = list(sys.version_info[:2])  # docstrings come out of this interpreter's parser
    files = _files(source)
    if files is None:
        assert isinstance(source, HuggingFaceSource)
        settings["dataset"] = huggingface.load(source)._fingerprint  # the library's own, of revision and files
    else:
        name = hash_settings([source.kind, source.model_dump(include={"path", "paths"})])
        settings["files"] = content_hashes(files, cache_dir / "fingerprints" / name)
    return hash_settings(settings)


def _files(source: Source) -> list[Path] | None:
    """The files behind a source in reading order, or None for a hub dataset."""
    match source:
        case TextSource() | JSONLSource() | ParquetSource():
            return expand(source.paths, source.kind)
        case PythonSource():
            return python_tree.files(source)
        case HuggingFaceSource():
            directory = huggingface.local_directory(source)
            return None if directory is None else _visible_files(directory)


def _visible_files(directory: Path) -> list[Path]:
    found = []
    for parent, below, names in os.walk(directory):
        below[:] = [name for name in below if not name.startswith(".")]
        # cache-*.arrow: what the datasets library itself leaves beside a saved dataset when mapping it
        found += [Path(parent, name) for name in names if not name.startswith((".", "cache-"))]
    return sorted(path for path in found if path.is_file())


def content_hashes(files: list[Path], memo: Path) -> list[str]:
    """Content hashes in order. One process hashes while others wait for what it remembers in the file `memo`."""
    memo.parent.mkdir(parents=True, exist_ok=True)
    with permission_told(), FileLock(f"{memo}.lock"):
        known = _read_memo(memo)
        fresh: dict[str, tuple[list[int], str]] = {}
        hashes = []
        for path in files:
            key, state = _state(path)
            entry = known.get(key)
            if entry is None or entry[0] != state:
                entry = (state, hash_file(path))
            hashes.append(entry[1])
            if time.time_ns() - state[1] > SETTLED_NANOSECONDS and _state(path)[1] == state:
                fresh[key] = entry
        if fresh != known:
            aside = memo.with_suffix(".partial")
            aside.write_text(json.dumps(fresh))
            os.replace(aside, memo)
    return hashes


def _state(path: Path) -> tuple[str, list[int]]:
    return os.path.realpath(path), identity(path)


def _read_memo(memo: Path) -> dict[str, tuple[list[int], str]]:
    try:
        return _MEMO.validate_json(memo.read_bytes(), strict=True)
    except FileNotFoundError:
        return {}
    except ValidationError:
        log.warning("%s is damaged; the files are hashed again", memo)
        return {}
