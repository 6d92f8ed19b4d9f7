"""Files that are whole or absent, and tensors in the safetensors format.

The writer here streams one tensor at a time and hashes while it writes. safetensors' own `save_file`
needs every tensor in host memory at once, which for a GPU's share of a large state is its whole
memory over again, and its file would have to be read again to be hashed. Reading is safetensors'.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmtrain.directories import fsync_path

_CHUNK_BYTES = 1 << 24  # hashed and written at a time, at once: 16 MB measured as good as any larger

# https://github.com/huggingface/safetensors, "Format": 8 bytes of header length, JSON header, data.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """How safetensors calls the dtype of the tensor `name`; raises ValueError where it has none such."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name!r}: safetensors has no {dtype}")
    return DTYPE_NAMES[dtype]


class FileRecord(BaseModel):
    """What a file must be to count as whole."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


@contextmanager
def written_aside(path: Path) -> Iterator[IO[str]]:
    """A text file to write that takes the place of `path` at once and whole, or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Writes a small file down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes `tensors`, on any device and of any strides, down to the disk as one safetensors file.

    Tensors that share memory (tied weights) are written once under each name, so that each reads
    back by itself. At most one tensor at a time is copied to host memory.

    Raises:
        ValueError: the format has no such dtype.
        OSError: the disk is full, or fails.
    """
    # Widest elements first, as safetensors orders them: every tensor is then aligned in the mapping.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        header = _header(tensors, names)
        digest.update(header)
        file.write(header)
        for name in names:
            content = _content(tensors[name])
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                hashed = hasher.submit(digest.update, chunk)
                file.write(chunk)
                hashed.result()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileRecord(sha256=digest.hexdigest(), bytes=size)


def _header(tensors: Mapping[str, Tensor], names: list[str]) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": dtype_name(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")  # numpy gives strides of 0 to what is empty, and torch no bytes of such
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def problem_with(path: Path, record: FileRecord) -> str | None:
    """Why the file is not the recorded one, or None if it is; reads all of it."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path.name} has {size} bytes and should have {record.bytes}"
        digest = _sha256_of(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None if digest == record.sha256 else f"{path.name} does not match its sha256"


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 kB"; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
