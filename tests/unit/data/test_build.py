"""From a recipe to its tokenizer and rows, on small real files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import build as module
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.cache import is_held_out
from llmtrain.data.order import MixtureOrder, ShuffledOrder
from llmtrain.data.packing import PackedRows, Rows, SeparateRows
from llmtrain.data.tokenizer_training import train_sentencepiece
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Recipe, SentencePieceTokenizer
from tests.unit.data.corpora import byte_level_tokenizer, recipe, text_documents, write_lines

TEXTS = [text.replace("\n", " ").strip() for text in text_documents(200)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus.txt", TEXTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return cache_directory(str(tmp_path / "cache"))


def lines(file: Path, **more: object) -> dict[str, object]:
    return {"kind": "text", "paths": [str(file)], "document": "line", **more}


def texts_in(rows: list[Rows], recipe: Recipe, cache: Path) -> set[str]:
    tokenizer = prepare_tokenizer(recipe, cache)
    stream = np.concatenate([source[i].input_ids for source in rows for i in range(len(source))])
    text = str(tokenizer.decode(stream[stream != tokenizer.pad_token_id]))
    return set(text.replace("<s>", "").split("</s>")) - {""}


def test_a_recipe_becomes_rows(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(data={"train": [lines(file)], "validation_fraction": 0.2})
    tokenizer = prepare_tokenizer(asked, cache)
    assert len(tokenizer) == 320
    datasets = prepare_data(asked, tokenizer, cache)
    assert texts_in(datasets.train, asked, cache) == {text for text in TEXTS if not is_held_out(text, 0.2)}
    assert texts_in(datasets.validation, asked, cache) == {text for text in TEXTS if is_held_out(text, 0.2)}
    assert isinstance(datasets.train[0], PackedRows) and isinstance(datasets.order(0), ShuffledOrder)
    num = len(datasets.train[0])
    assert datasets.steps_per_epoch(4) == num / 4 and datasets.steps_per_epoch(num) == 1
    with pytest.raises(InputError, match=f"epochs: an epoch has {num} rows, and one optimizer step takes {num + 1}"):
        datasets.steps_per_epoch(num + 1)

    # Again, and nothing is trained or tokenised.
    monkeypatch.setattr(module, "train_sentencepiece", None)
    monkeypatch.setattr("llmtrain.data.cache._write", None)
    again = prepare_data(asked, prepare_tokenizer(asked, cache), cache)
    assert np.array_equal(again.train[0][0].input_ids, datasets.train[0][0].input_ids)


def test_the_tokenizer_never_sees_held_out_text(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(documents: Iterable[str], spec: SentencePieceTokenizer, directory: Path) -> None:
        seen.extend(documents)
        train_sentencepiece(seen, spec, directory)

    monkeypatch.setattr(module, "train_sentencepiece", spy)
    prepare_tokenizer(recipe(data={"train": [lines(file)], "validation_fraction": 0.2}), cache)
    assert seen == [text for text in TEXTS if not is_held_out(text, 0.2)]
    del seen[:]
    prepare_tokenizer(recipe(data={"train": [lines(file)], "validation": [lines(file)]}), cache)
    assert seen == TEXTS


def test_tokenizers_are_kept_by_text_and_settings(file: Path, cache: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.txt", TEXTS[1:])
    sections: list[dict[str, Any]] = [
        {"data": {"train": [lines(file)]}},
        {"data": {"train": [lines(file, weight=2.0)]}},  # the same tokenizer as the first
        {"data": {"train": [lines(other)]}},
        {"data": {"train": [lines(file)], "validation_fraction": 0.5}},
        {"data": {"train": [lines(file)]}, "tokenizer": {"kind": "sentencepiece", "vocab_size": 330}},
    ]
    for section in sections:
        prepare_tokenizer(recipe(**section), cache)
    assert len([path for path in (cache / "tokenizers").iterdir() if path.is_dir()]) == 4


def test_sources_of_their_own_for_validation_and_weights(file: Path, cache: Path, tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "held_out.txt", [f"held out {i}" for i in range(5)])
    data = {"train": [lines(file, weight=3.0), lines(file, weight=1.0)], "validation": [lines(held_out)]}
    asked = recipe(data={**data, "packing": "none"})
    datasets = prepare_data(asked, prepare_tokenizer(asked, cache), cache)
    assert texts_in(datasets.validation, asked, cache) == {f"held out {i}" for i in range(5)}
    assert texts_in(datasets.train, asked, cache) >= {text for text in TEXTS if len(text) < 15}
    assert datasets.weights == [3.0, 1.0]
    order = datasets.order(0)
    assert isinstance(order, MixtureOrder) and order.counts == [750, 250]
    assert all(isinstance(rows, SeparateRows) for rows in [*datasets.train, *datasets.validation])


def test_the_fingerprint_tells_which_data_changed(cache: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    write_lines(train, TEXTS[:50])
    write_lines(held_out, TEXTS[50:60])

    def prints() -> dict[str, str]:
        asked = recipe(data={"train": [lines(train)], "validation": [lines(held_out)]})
        return prepare_data(asked, tokenizer, cache).fingerprint

    first = prints()
    assert first == prints() and first.keys() == {"data.train", "data.validation"}
    write_lines(held_out, TEXTS[50:61])
    second = prints()
    assert second["data.train"] == first["data.train"] and second["data.validation"] != first["data.validation"]
    write_lines(train, TEXTS[:49])
    assert prints()["data.train"] != second["data.train"]
    split = recipe(data={"train": [lines(train)], "validation_fraction": 0.2})
    assert prepare_data(split, tokenizer, cache).fingerprint.keys() == {"data.train"}


def test_nothing_held_out_where_none_was_asked(file: Path, cache: Path) -> None:
    asked = recipe(data={"train": [lines(file)], "validation_fraction": 0.0})
    assert prepare_data(asked, prepare_tokenizer(asked, cache), cache).validation == []


def test_too_few_documents_to_hold_one_out(file: Path, cache: Path) -> None:
    one_document = lines(file, document="file")
    tokenizer = byte_level_tokenizer(TEXTS)
    with pytest.raises(InputError, match="holds out none") as caught:
        prepare_data(recipe(data={"train": [one_document], "validation_fraction": 1e-9}), tokenizer, cache)
    assert caught.value.where == "data.validation_fraction" and caught.value.remedy
    with pytest.raises(InputError, match="all 1 documents of text .* are held out") as caught:
        prepare_data(recipe(data={"train": [one_document], "validation_fraction": 0.999999}), tokenizer, cache)
    assert caught.value.where == "data.train.0" and caught.value.remedy


def test_pretrained_tokenizers(file: Path, cache: Path, tmp_path: Path) -> None:
    byte_level_tokenizer(TEXTS).save_pretrained(tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer")
    data = {"train": [lines(file)]}
    for sections in (
        {"tokenizer": {"kind": "pretrained", "path": path}},
        {"tokenizer": {"kind": "model"}, "model": {"kind": "pretrained", "path": path}},
    ):
        assert prepare_tokenizer(recipe(data=data, **sections), cache).eos_token == "<|endoftext|>"
    with pytest.raises(InputError, match="no such directory"):
        prepare_tokenizer(recipe(data=data, tokenizer={"kind": "pretrained", "path": f"{path}/no"}), cache)
    gguf = {"kind": "gguf", "file": str(tmp_path / "missing.gguf")}
    with pytest.raises(InputError) as caught:
        prepare_tokenizer(recipe(data=data, model=gguf, tokenizer={"kind": "model"}), cache)
    assert "missing.gguf" in str(caught.value)


def test_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "environment"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory(None) == tmp_path / "environment"
    assert cache_directory(str(tmp_path / "recipe")) == tmp_path / "recipe"
    assert cache_directory("~/cache") == tmp_path / "home" / "cache"
    monkeypatch.delenv("LLMTRAIN_CACHE")
    assert cache_directory(None) == tmp_path / "home" / ".cache" / "llmtrain"


def test_a_cache_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the cache directory") as caught:
        cache_directory(str(tmp_path / "file" / "below"))
    assert caught.value.where == "data.cache_dir" and caught.value.remedy
    monkeypatch.setenv("LLMTRAIN_CACHE", "/proc/nothing")
    with pytest.raises(InputError) as caught:
        cache_directory(None)
    assert caught.value.where == "$LLMTRAIN_CACHE"
