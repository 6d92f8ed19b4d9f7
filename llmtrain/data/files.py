"""Finding input files and reading them as UTF-8, with errors that name file, line and byte."""

import codecs
import glob
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from llmtrain.errors import InputError

GLOB_CHARACTERS = frozenset("*?[")
ENDINGS = {"text": "txt", "jsonl": "jsonl", "parquet": "parquet"}  # by kind of source, to suggest

# How files of gzip, zstd, xz, bzip2 and zip begin.
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04")


def expand(patterns: Sequence[str], kind: Literal["text", "jsonl", "parquet"]) -> list[Path]:
    """The files that the paths and globs of a source of that kind name, each once, sorted.

    Raises:
        InputError: a pattern that names no file.
    """
    return sorted({path for pattern in patterns for path in _expand_one(pattern, ENDINGS[kind])})


def _expand_one(pattern: str, ending: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = path / "**" / f"*.{ending}"
        raise InputError("is a directory", where=pattern, remedy=f"name its files, for example {files}")
    if GLOB_CHARACTERS.isdisjoint(pattern):
        message = f"{why_missing(path, 'file')} (looked in {Path.cwd()})"
        raise InputError(message, where=pattern, remedy="correct the path")
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    if not found:
        remedy = "correct the pattern; names that begin with a dot are matched only by a pattern that has the dot"
        raise InputError(f"matches no file (looked in {Path.cwd()})", where=pattern, remedy=remedy)
    return found


def why_missing(path: Path, what: Literal["file", "directory"]) -> str:
    """Why `path` was not found as what it should be; os.path tells only that it was not."""
    try:
        path.stat()
    except FileNotFoundError:
        return f"no such {what}"
    except OSError as error:  # no permission to look, a name too long, a file in place of a directory
        return str(error.strerror)
    return f"is no {what}"


def open_binary(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def read_text(path: Path) -> str:
    """A whole file; line ends stay as they are, a byte-order mark goes."""
    with open_binary(path) as file:
        return decode(file.read(), path, first_line=1, first_byte=0)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) one after another."""
    first_byte = 0
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, decode(line, path, number, first_byte)
            first_byte += len(line)


def decode(data: bytes, path: Path, first_line: int, first_byte: int) -> str:
    """`data`, which begins at `first_line` and `first_byte` of the file, as UTF-8."""
    if first_byte == 0 and data.startswith(codecs.BOM_UTF8):
        data, first_byte = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if first_byte == 0 and data.startswith(COMPRESSED):
            raise InputError("it is compressed", where=str(path), remedy="unpack it, for example with gunzip") from None
        line = first_line + data.count(b"\n", 0, error.start)
        encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"
        name = shlex.quote(str(path))
        raise InputError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {first_byte + error.start}",
            where=f"{path}:{line}",
            remedy=f"convert it, for example: iconv -f {encoding} -t UTF-8 {name} > converted",
        ) from None
