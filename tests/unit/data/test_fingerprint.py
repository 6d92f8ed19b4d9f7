"""Fingerprints follow content and settings, and files are not hashed twice."""

import json
import os
from pathlib import Path

import datasets
import pytest

from llmtrain.data import fingerprint as module
from llmtrain.data import huggingface
from llmtrain.data.fingerprint import fingerprint
from llmtrain.data.hashing import hash_file
from llmtrain.recipe.schema import HuggingFaceSource, PythonSource, TextSource

OLD = 1_000_000_000  # a modification time long past


def text_source(directory: Path, **more: object) -> TextSource:
    return TextSource.model_validate({"kind": "text", "paths": [f"{directory}/*.txt"], **more})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / f"{name}.txt").write_text(f"text {name}")
        os.utime(directory / f"{name}.txt", (OLD, OLD))
    return directory


def test_content_and_settings_decide(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = fingerprint(text_source(corpus), cache)
    assert fingerprint(text_source(corpus), cache) == first
    assert fingerprint(text_source(corpus), tmp_path / "other cache") == first
    assert fingerprint(text_source(corpus, weight=2.0), cache) == first
    assert fingerprint(text_source(corpus, document="line"), cache) != first

    moved = corpus.rename(tmp_path / "moved")
    assert fingerprint(text_source(moved), cache) == first
    (moved / "b.txt").write_text("text c")
    assert fingerprint(text_source(moved), cache) != first


def test_the_order_of_files_counts(corpus: Path, tmp_path: Path) -> None:
    first = fingerprint(text_source(corpus), tmp_path / "cache")
    (corpus / "a.txt").rename(corpus / "z.txt")
    assert fingerprint(text_source(corpus), tmp_path / "cache") != first


def test_hashes_are_remembered(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(module, "hash_file", counted)
    first = fingerprint(text_source(corpus), tmp_path / "cache")
    assert len(hashed) == 2
    assert fingerprint(text_source(corpus), tmp_path / "cache") == first
    assert len(hashed) == 2

    (corpus / "a.txt").write_text("text A")  # the same size, and just now: not to be remembered
    for expected in (3, 4):
        assert fingerprint(text_source(corpus), tmp_path / "cache") != first
        assert len(hashed) == expected


@pytest.mark.parametrize("content", ['{"a": ', "[]", "null", '{"a": []}', '{"a": [[1], 2]}', "\0", "[" * 100_000])
def test_a_damaged_memo_is_made_anew(
    corpus: Path, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = fingerprint(text_source(corpus), tmp_path / "cache")
    (memo,) = (path for path in (tmp_path / "cache" / "fingerprints").iterdir() if path.suffix != ".lock")
    memo.write_text(content)
    assert fingerprint(text_source(corpus), tmp_path / "cache") == first
    assert "is damaged; the files are hashed again" in caplog.text
    assert len(json.loads(memo.read_text())) == 2


def test_python_and_saved_datasets(corpus: Path, tmp_path: Path) -> None:
    (corpus / "m.py").write_text("x = 1\n")
    source = PythonSource.model_validate({"kind": "python", "path": str(corpus)})
    docstrings = source.model_copy(update={"content": "docstrings"})
    assert fingerprint(source, tmp_path) != fingerprint(docstrings, tmp_path)

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(saved))
    hub = HuggingFaceSource.model_validate({"kind": "huggingface", "path": str(saved)})
    first = fingerprint(hub, tmp_path)
    assert fingerprint(hub, tmp_path) == first
    datasets.Dataset.from_dict({"text": ["a", "c"]}).save_to_disk(str(saved))
    assert fingerprint(hub, tmp_path) != first


def test_datasets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub dataset is told by the library's own fingerprint; a directory stands in for the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface, "local_directory", lambda source: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    source = HuggingFaceSource.model_validate({"kind": "huggingface", "path": str(tmp_path / "data")})
    first = fingerprint(source, tmp_path)
    assert fingerprint(source, tmp_path) == first
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "another"}\n')
    assert fingerprint(source, tmp_path) != first
