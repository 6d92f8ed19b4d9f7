"""Hashes of content and settings."""

import hashlib
from pathlib import Path

import pytest

from llmtrain.data.hashing import derive_seed, hash_file, hash_settings, uniform


def test_hash_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than a block
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == hashlib.blake2b(data, digest_size=20).hexdigest()


def test_settings_are_hashed_whatever_their_order() -> None:
    assert hash_settings({"a": 1, "b": [2.5, None]}) == hash_settings({"b": [2.5, None], "a": 1})
    assert hash_settings({"a": 1}) != hash_settings({"a": "1"})


def test_uniform_is_uniform_and_pinned() -> None:
    values = [uniform(f"text {i}", "split") for i in range(10_000)]
    assert all(0 <= value < 1 for value in values)
    counts = [sum(low <= value * 10 < low + 1 for value in values) for low in range(10)]
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 27.9  # 9 degrees of freedom, p = 0.001
    assert uniform("text", "split") != uniform("text", "sample")
    # A change here would move documents between training and validation.
    assert uniform("a document", "split") == pytest.approx(0.9182653074024534, abs=1e-15)


def test_seeds_differ_by_purpose() -> None:
    seeds = [derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "a", 1), derive_seed(0, "a", 2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
