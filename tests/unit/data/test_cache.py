"""The tokenised cache holds every document once, in its half, and is built once."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import cache as module
from llmtrain.data.cache import Halves, TokenCorpus, is_held_out, tokenised
from llmtrain.data.documents import Examples, Texts
from llmtrain.data.formats import read_examples
from llmtrain.data.tokenizer import encode_documents
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Data, JSONLSource, TextSource
from tests.unit.data.corpora import byte_level_tokenizer, text_documents, write_lines

TEXTS = [text.replace("\n", " ").strip() for text in text_documents(300)]
TOKENIZER = byte_level_tokenizer(TEXTS)


def line_source(file: Path) -> TextSource:
    return TextSource.model_validate({"kind": "text", "paths": [str(file)], "document": "line"})


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    return line_source(write_lines(tmp_path / "corpus.txt", TEXTS))


def documents(corpus: TokenCorpus) -> list[list[int]]:
    return [part.tolist() for part in np.split(corpus.tokens, corpus.document_ends)[:-1]]


def build(source: TextSource, cache: Path, fraction: float = 0.2) -> Halves:
    return tokenised(source, Texts(TOKENIZER), fraction, cache)


@pytest.mark.parametrize("batch_characters", [1, 1000, 4_000_000])
def test_every_document_is_in_its_half(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", batch_characters)
    halves = build(source, tmp_path / "cache")
    for corpus, held_out in ((halves.train, False), (halves.validation, True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.2) == held_out]
        expected = [[*ids, TOKENIZER.eos_token_id] for ids in encode_documents(TOKENIZER, texts)]
        assert documents(corpus) == expected
        assert corpus.num_documents == len(texts) and corpus.num_tokens == sum(map(len, expected))
        assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
        assert corpus.tokens.dtype == np.uint16 and corpus.document_ends.dtype == np.int64
        assert isinstance(corpus.tokens, np.memmap) and not corpus.tokens.flags.writeable
    assert 30 < halves.validation.num_documents < 90


def test_documents_begin_with_bos_where_there_is_one(source: TextSource, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    found = documents(tokenised(source, Texts(tokenizer), 0.0, tmp_path / "cache").train)
    assert {ids[0] for ids in found} == {tokenizer.bos_token_id}
    assert {ids[-1] for ids in found} == {tokenizer.eos_token_id}
    assert [ids[1:-1] for ids in found] == encode_documents(tokenizer, TEXTS)


def test_large_vocabularies_take_32_bits(source: TextSource, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(2**16)])
    assert tokenised(source, Texts(tokenizer), 0.0, tmp_path / "cache").train.tokens.dtype == np.uint32


def test_membership_does_not_move_when_documents_are_added(source: TextSource, tmp_path: Path) -> None:
    before = build(source, tmp_path / "cache")
    more = write_lines(tmp_path / "more.txt", [f"another {i}" for i in range(100)] + TEXTS[::-1])
    after = build(line_source(more), tmp_path / "cache")
    for half in ("train", "validation"):
        old, new = ({tuple(ids) for ids in documents(getattr(halves, half))} for halves in (before, after))
        assert old < new


def test_it_is_built_once_for_the_same_content_and_settings(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = build(source, cache)
    (cache_entry,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    about = json.loads((cache_entry / "manifest.json").read_text())["about"]
    assert about["source"]["paths"] == source.paths and about["validation_fraction"] == 0.2

    monkeypatch.setattr(module, "_write", None)  # building again would call it
    again = build(line_source(write_lines(tmp_path / "copy.txt", TEXTS)), cache)
    assert documents(again.train) == documents(first.train)
    others = [
        (source, TOKENIZER, 0.3),
        (source.model_copy(update={"document": "file"}), TOKENIZER, 0.2),
        (source, byte_level_tokenizer(TEXTS, vocab_size=300), 0.2),
        (line_source(write_lines(tmp_path / "other.txt", TEXTS[1:])), TOKENIZER, 0.2),
    ]
    for source, tokenizer, fraction in others:
        with pytest.raises(TypeError):
            tokenised(source, Texts(tokenizer), fraction, cache)


def test_an_empty_half_is_empty(source: TextSource, tmp_path: Path) -> None:
    validation = build(source, tmp_path / "cache", fraction=0.0).validation
    assert (validation.num_documents, validation.num_tokens, validation.num_bytes) == (0, 0, 0)


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    source = line_source(write_lines(tmp_path / "corpus.txt", ["", "  "]))
    with pytest.raises(InputError, match="the corpus is empty") as caught:
        build(source, tmp_path / "cache")
    assert caught.value.where == f"text {tmp_path / 'corpus.txt'}" and caught.value.remedy


def test_a_source_that_changes_meanwhile_is_an_error(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write

    def write_while_it_grows(*arguments: object) -> object:
        with open(source.paths[0], "a") as file:
            file.write("one more\n")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write", write_while_it_grows)
    with pytest.raises(InputError, match="changed while it was being tokenised"):
        build(source, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


# ---------------------------------------------------------------------------- examples with masks


def chats(path: Path, num: int = 40) -> JSONLSource:
    """Conversations of one turn, of which every third comes twice."""
    rows = [{"messages": [turn("user", f"say {i}"), turn("assistant", f"word {i} word")]} for i in range(num)]
    lines = [json.dumps(row) + "\n" for i, row in enumerate(rows) for _ in range(2 if i % 3 == 0 else 1)]
    path.write_text("".join(lines))
    return JSONLSource.model_validate({"kind": "jsonl", "paths": [str(path)]})


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def examples(source: JSONLSource, **settings: object) -> Examples:
    return Examples(TOKENIZER, Data.model_validate({"train": [source], "chat_template": "plain", **settings}))


@pytest.mark.parametrize("batch_characters", [1, 4_000_000])
def test_examples_keep_their_masks_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", batch_characters)
    source = chats(tmp_path / "chats.jsonl")
    read = list(read_examples(source))
    encoded = examples(source).encode(read)
    halves = tokenised(source, examples(source), 0.3, tmp_path / "cache")
    for corpus, held_out in ((halves.train, False), (halves.validation, True)):
        numbers = [i for i, example in enumerate(read) if is_held_out(example.content, 0.3) == held_out]
        assert corpus.numbers is not None and corpus.numbers.tolist() == numbers and len(numbers) > 5
        assert corpus.trained is not None and corpus.trained.dtype == np.uint8
        masks = [part.astype(bool).tolist() for part in np.split(corpus.trained, corpus.document_ends)[:-1]]
        assert documents(corpus) == [encoded[number].ids for number in numbers]
        assert masks == [encoded[number].trained for number in numbers]
        assert 0 < corpus.trained.sum() < corpus.num_tokens
        assert corpus.lengths().tolist() == [len(encoded[number].ids) for number in numbers]
        assert corpus.lengths(2, 4).tolist() == corpus.lengths().tolist()[2:4]
    assert halves.num_duplicates == halves.num_empty == 0


@pytest.mark.parametrize("batch_characters", [1, 4_000_000])
def test_duplicates_are_left_out_and_counted(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", batch_characters)
    twice = line_source(write_lines(tmp_path / "twice.txt", [*TEXTS, *TEXTS[::2]]))
    once, found = (
        tokenised(which, Texts(TOKENIZER), 0.2, tmp_path / "cache", deduplicate=True) for which in (source, twice)
    )
    assert once.num_duplicates == 0 and found.num_duplicates == len(TEXTS[::2])
    for half in ("train", "validation"):
        assert documents(getattr(found, half)) == documents(getattr(once, half))
    kept = tokenised(twice, Texts(TOKENIZER), 0.2, tmp_path / "cache")
    assert kept.train.num_documents > found.train.num_documents and kept.num_duplicates == 0

    chat = chats(tmp_path / "chats.jsonl", num=30)
    halves = tokenised(chat, examples(chat), 0.0, tmp_path / "cache", deduplicate=True)
    assert halves.num_duplicates == 10 and halves.train.num_documents == 30
    assert halves.train.numbers is not None and halves.train.numbers.tolist()[:5] == [0, 2, 3, 4, 6]


def test_what_is_trained_is_in_the_key(tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl")
    cache = tmp_path / "cache"
    ways = [examples(source), examples(source, train_on="all"), examples(source, train_on="last_assistant")]
    assert len({tokenised(source, way, 0.1, cache).key for way in ways}) == 3
    named = source.model_copy(update={"format": "messages"})
    assert tokenised(named, ways[0], 0.1, cache).key != tokenised(source, ways[0], 0.1, cache).key
