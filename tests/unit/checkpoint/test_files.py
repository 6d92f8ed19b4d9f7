import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.files import (
    _CHUNK_BYTES,
    problem_with,
    readable_bytes,
    write_bytes,
    write_tensors,
    written_aside,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_reads_every_dtype_that_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.randn(5, 3) * 10).to(dtype),
        "scalar": torch.tensor(1.0).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "strided": (torch.randn(6, 4) * 10).to(dtype).T[::2],
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_mixed_dtypes_are_aligned_whatever_their_order(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([True]),
        "b": torch.randn(3, dtype=torch.float64),
        "c": torch.randn(5).bfloat16(),
        "d": torch.arange(7),
    }
    write_tensors(tmp_path / "a", tensors)
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    header_bytes = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + header_bytes])
    for name, tensor in tensors.items():
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_tied_and_overlapping_tensors_read_back_by_themselves(tmp_path: Path) -> None:
    weight = torch.randn(8, 4, requires_grad=True)
    write_tensors(tmp_path / "a", {"embedding": weight, "head": weight, "part": weight[2:5]})
    read = load_file(tmp_path / "a")
    assert torch.equal(read["embedding"], weight) and torch.equal(read["head"], weight)
    assert torch.equal(read["part"], weight[2:5])


def test_the_record_is_that_of_the_file_also_beyond_one_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a"
    record = write_tensors(path, {"large": torch.randint(0, 255, (2 * _CHUNK_BYTES + 5,), dtype=torch.uint8)})
    content = path.read_bytes()
    assert record.bytes == len(content) and record.sha256 == hashlib.sha256(content).hexdigest()
    assert problem_with(path, record) is None


def test_no_tensors_is_a_file_too(tmp_path: Path) -> None:
    record = write_tensors(tmp_path / "a", {})
    assert problem_with(tmp_path / "a", record) is None
    assert load_file(tmp_path / "a") == {}


def test_an_empty_tensor_of_numpy_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"empty": torch.from_numpy(np.zeros(0, np.float32)), "one": torch.ones(1)})
    read = load_file(tmp_path / "a")
    assert read["empty"].shape == (0,) and read["one"] == 1


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'z'.*complex128"):
        write_tensors(tmp_path / "a", {"z": torch.zeros(1, dtype=torch.complex128)})


def test_problems_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a"
    record = write_bytes(path, b"content")
    assert problem_with(path, record) is None
    path.write_bytes(b"Content")
    assert problem_with(path, record) == "a does not match its sha256"
    path.write_bytes(b"conten")
    assert problem_with(path, record) == "a has 6 bytes and should have 7"
    path.unlink()
    assert problem_with(path, record) == "a is missing"
    path.mkdir()
    assert "a " in str(problem_with(path, record))


def test_written_aside_replaces_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with written_aside(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError):
        _write_half(path)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def _write_half(path: Path) -> None:
    with written_aside(path) as file:
        file.write("half")
        raise RuntimeError


def test_readable_bytes() -> None:
    assert [readable_bytes(size) for size in (0, 999, 1536, 2.5e6, 7e9, 1.2e13)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "7.0 GB",
        "12.0 TB",
    ]
