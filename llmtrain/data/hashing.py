"""Hashes that name content: of files, of settings, of documents."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmtrain.data.files import open_binary
from llmtrain.errors import InputError

BLOCK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """BLAKE2b of the content, 160 bits in hexadecimal."""
    digest = hashlib.blake2b(digest_size=20)
    with open_binary(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def identity(path: Path) -> list[int]:
    """Size, modification time in nanoseconds and inode: the same as long as a file is neither written nor replaced.

    Raises:
        InputError: it cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def hash_settings(settings: Any) -> str:
    """BLAKE2b of a JSON value, independent of the order of keys."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=20).hexdigest()


def uniform(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone; each purpose (16 bytes at most) has its own."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode())
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53  # 53 bits: exact in a float, so never 1.0


def derive_seed(seed: int, *path: str | int) -> int:
    """A 64-bit seed for one purpose, independent of those for others."""
    digest = hashlib.blake2b(json.dumps([seed, *path]).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
