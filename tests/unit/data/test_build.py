"""From a recipe to its tokenizer and rows, on small real files."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from llmtrain.data import build as module
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.cache import is_held_out, tokenised
from llmtrain.data.documents import Examples
from llmtrain.data.formats import read_examples
from llmtrain.data.grouping import LengthGroupedOrder
from llmtrain.data.order import MixtureOrder, ShuffledOrder
from llmtrain.data.packing import IGNORE_INDEX, PackedRows, PlannedRows, Rows
from llmtrain.data.prepared import SourceRows, check_trained, plan_settings
from llmtrain.data.row_plan import plan_rows
from llmtrain.data.tokenizer import encode_documents, load_tokenizer
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
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    stream = np.concatenate([source[i].input_ids for source in rows for i in range(len(source))])
    text = str(tokenizer.decode(stream[stream != tokenizer.pad_token_id]))
    return set(text.replace("<s>", "").split("</s>")) - {""}


def test_a_recipe_becomes_rows(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(data={"train": [lines(file)], "validation_fraction": 0.2})
    tokenizer = prepare_tokenizer(asked, cache).tokenizer
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
    again = prepare_data(asked, prepare_tokenizer(asked, cache).tokenizer, cache)
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
    datasets = prepare_data(asked, prepare_tokenizer(asked, cache).tokenizer, cache)
    assert texts_in(datasets.validation, asked, cache) == {f"held out {i}" for i in range(5)}
    assert texts_in(datasets.train, asked, cache) >= {text for text in TEXTS if len(text) < 15}
    assert datasets.weights == [3.0, 1.0]
    order = datasets.order(0)
    assert isinstance(order, MixtureOrder) and order.counts == [750, 250]
    assert all(isinstance(rows, PlannedRows) for rows in [*datasets.train, *datasets.validation])


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


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations: the first has an answer that lies behind a long question, the second comes twice."""
    path = tmp_path / "chats.jsonl"
    conversations = [("word " * 50, "yes"), ("what?", "this"), ("what?", "this")]
    conversations += [(f"what is {i}?", "well " * (i % 30) + str(i)) for i in range(60)]
    with path.open("w") as file:
        for question, answer in conversations:
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def chat_recipe(chats: Path, **data: Any) -> Recipe:
    """Rows of 48 tokens; a conversation of the byte-level tokenizer has some 25 to 100."""
    section = {
        "train": [{"kind": "jsonl", "paths": [str(chats)]}],
        "chat_template": "plain",
        "validation_fraction": 0.0,
    }
    return recipe(sequence_length=48, algorithm={"kind": "sft"}, data={**section, **data})


@pytest.mark.parametrize("how", [{}, {"packing": "none"}, {"packing": "none", "group_by_length": True}])
@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_chats_become_rows(
    chats: Path, cache: Path, caplog: pytest.LogCaptureFixture, how: dict[str, Any], overflow: str
) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    asked = chat_recipe(chats, deduplicate=True, overflow=overflow, **how)
    (documents,) = [Examples(tokenizer, asked.data).encode(list(read_examples(asked.data.train[0])))]
    del documents[2]  # the duplicate
    most = 49 if overflow == "truncate" else 10**6  # a row's last target stands behind it
    expected = sorted(
        index
        for document in documents
        for index, counts in list(zip(document.ids, document.trained, strict=True))[1:most]
        if counts
    )
    datasets = prepare_data(asked, tokenizer, cache)
    (rows,) = datasets.train
    targets = np.concatenate([rows[i].targets for i in range(len(rows))])
    assert sorted(targets[targets != IGNORE_INDEX].tolist()) == expected
    assert all((rows[i].targets != IGNORE_INDEX).any() for i in range(len(rows)))
    assert isinstance(datasets.order(0), LengthGroupedOrder if "group_by_length" in how else ShuffledOrder)
    long = sum(len(document.ids) > 49 for document in documents)
    assert 0 < long < 62
    text = caplog.text
    if overflow == "truncate":
        lost = sum(max(0, len(document.ids) - 49) for document in documents)
        assert f"{long} of 62 documents are longer than a row of 48 tokens and were truncated: {lost:,} tokens" in text
        assert "1 of 62 documents have no trained token in the rows and were left out" in text
    else:
        assert f"{long} of 62 documents are longer than a row of 48 tokens and were split" in text
        assert "have no trained token in the rows" not in text


def test_too_many_examples_without_a_trained_token(chats: Path, cache: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    with pytest.raises(InputError) as caught:
        prepare_data(chat_recipe(chats, max_empty_share=0.01), tokenizer, cache)
    assert caught.value.where == "data.train.0"
    assert "1 of 63 documents of jsonl" in caught.value.message and "(1.6%)" in caught.value.message
    assert "of 1 all lie beyond sequence_length 48" in caught.value.message
    assert f"the first is {chats}:1" in caught.value.message
    assert caught.value.remedy is not None and "raise sequence_length" in caught.value.remedy
    prepare_data(chat_recipe(chats, max_empty_share=0.02), tokenizer, cache)


def test_examples_that_are_trained_on_nothing_by_themselves(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{i} and", "completion": "so on"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level_tokenizer(TEXTS)
    asked = chat_recipe(path)
    examples = Examples(tokenizer, asked.data)
    halves = tokenised(asked.data.train[0], examples, 0.0, cache)
    corpus = replace(halves.train, trained=np.zeros(halves.train.num_tokens, np.uint8))
    plan, counts = plan_rows(corpus, "untrained", plan_settings(asked), cache)
    made = PlannedRows(corpus, plan, 48, 0, ragged=False)
    half = SourceRows("data.train.0", asked.data.train[0], examples, corpus, made, plan, counts, 0, {})
    with pytest.raises(InputError, match=r"9 of 9 documents .* \(9 have none at all\)") as caught:
        check_trained(half, chat_recipe(path, max_empty_share=1.0))  # no row at all
    assert caught.value.remedy is not None and "data.chat_template" in caught.value.remedy


def test_formats_mix(chats: Path, cache: Path, file: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text("".join(json.dumps({"instruction": f"say {i}", "output": str(i)}) + "\n" for i in range(20)))
    train = [{"kind": "jsonl", "paths": [str(chats)]}, {"kind": "jsonl", "paths": [str(alpaca)]}, lines(file)]
    datasets = prepare_data(chat_recipe(chats, train=train, temperature=2.0), tokenizer, cache)
    num_rows = [len(rows) for rows in datasets.train]
    assert datasets.weights == pytest.approx([(num / max(num_rows)) ** 0.5 for num in num_rows])
    assert isinstance(datasets.order(0), MixtureOrder)
    targets = [np.concatenate([rows[i].targets for i in range(len(rows))]) for rows in datasets.train]
    shares = [(target != IGNORE_INDEX).mean() for target in targets]
    assert shares[2] > max(shares[:2])  # of a text all is trained
    with pytest.raises(InputError, match="a share that no run would draw from") as caught:
        prepare_data(chat_recipe(chats, train=train, temperature=0.01), tokenizer, cache)
    assert caught.value.where == "data.temperature" and caught.value.remedy


def test_the_fingerprint_tells_how_rows_are_made(chats: Path, cache: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    ways: list[dict[str, Any]] = [
        {},
        {"overflow": "split"},
        {"packing": "none"},
        {"packing": "none", "group_by_length": True},
        {"packing": "documents"},
        {"train_on": "all"},
        {"chat_template": "chatml"},
        {"deduplicate": True},
        {"temperature": 2.0},
    ]
    prints = [prepare_data(chat_recipe(chats, **way), tokenizer, cache).fingerprint["data.train"] for way in ways]
    assert len(set(prints)) == len(ways)
    assert prepare_data(chat_recipe(chats), tokenizer, cache).fingerprint["data.train"] == prints[0]


def test_nothing_held_out_where_none_was_asked(file: Path, cache: Path) -> None:
    asked = recipe(data={"train": [lines(file)], "validation_fraction": 0.0})
    assert prepare_data(asked, prepare_tokenizer(asked, cache).tokenizer, cache).validation == []


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
        assert prepare_tokenizer(recipe(data=data, **sections), cache).tokenizer.eos_token == "<|endoftext|>"
    with pytest.raises(InputError, match="no such directory"):
        prepare_tokenizer(recipe(data=data, tokenizer={"kind": "pretrained", "path": f"{path}/no"}), cache)
    gguf = {"kind": "gguf", "file": str(tmp_path / "missing.gguf")}
    with pytest.raises(InputError) as caught:
        prepare_tokenizer(recipe(data=data, model=gguf, tokenizer={"kind": "model"}), cache)
    assert "missing.gguf" in str(caught.value)


def test_tokens_that_are_added(file: Path, cache: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "tokenizer")
    before = byte_level_tokenizer(TEXTS)
    before.save_pretrained(path)

    def prepared(*tokens: str) -> PreTrainedTokenizerBase:
        spec = {"kind": "pretrained", "path": path, "add_tokens": list(tokens)}
        return prepare_tokenizer(recipe(data={"train": [lines(file)]}, tokenizer=spec), cache).tokenizer

    tokenizer = prepared("<|user|>", "<|assistant|>")
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]) == [len(before), len(before) + 1]
    assert tokenizer.encode("a<|user|>b", add_special_tokens=False)[1] == len(before)
    assert max(encode_documents(tokenizer, ["a<|user|>b"])[0]) < len(before)  # text stays text
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).get_vocab() == tokenizer.get_vocab()
    for token, message in (("<|endoftext|>", "is there already"), (" <|user|>", "begins or ends"), ("", "is empty")):
        with pytest.raises(InputError, match=message) as caught:
            prepared(token)
        assert caught.value.where == "tokenizer.add_tokens" and caught.value.remedy


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


def test_epochs_have_no_meaning_for_sources_with_weights(file: Path) -> None:
    for data in ({"train": [lines(file)], "temperature": 2.0}, {"train": [lines(file, weight=1.0)]}):
        with pytest.raises(ValidationError, match="epochs has no meaning for a weighted mixture"):
            recipe(data=data, steps=None, epochs=1.0)
