"""Loading tokenizers, encoding documents, and the bytes that each id stands for."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtrain.data.tokenizer import (
    document_frame,
    encode_documents,
    hash_tokenizer,
    load_tokenizer,
    num_ids,
    pad_id,
    token_byte_lengths,
)
from llmtrain.errors import InputError
from tests.unit.data.corpora import AWKWARD_TEXTS, byte_level_tokenizer, text_documents, unicode_text

BYTE_LEVEL = byte_level_tokenizer(text_documents(50))


def save_word_tokenizer(directory: Path, **config: object) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


@given(st.one_of(unicode_text, st.sampled_from(AWKWARD_TEXTS)))
def test_byte_lengths_of_byte_level_bpe_add_up(text: str) -> None:
    (ids,) = encode_documents(BYTE_LEVEL, [text])
    lengths = token_byte_lengths(BYTE_LEVEL)
    assert lengths.shape == (len(BYTE_LEVEL),)
    assert lengths[ids].sum() == len(text.encode("utf-8"))


def test_byte_lengths_of_metaspace_pieces_and_added_tokens() -> None:
    backend = Tokenizer(models.BPE({"<0x0A>": 0, "▁": 1, "a": 2, "▁a": 3, "é": 4}, [("▁", "a")], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(["▁tool"])
    names = ["<0x0A>", "▁", "a", "▁a", "é", "</s>", "▁tool"]
    lengths = token_byte_lengths(tokenizer)[tokenizer.convert_tokens_to_ids(names)]
    assert lengths.tolist() == [1, 1, 1, 2, 2, 0, 7]  # an added token is text as it stands


def test_documents_are_encoded_whole_and_as_plain_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(text_documents(50))
    texts = ["<|endoftext|> is text here", "word " * 100, "a"]
    expected = encode_documents(tokenizer, texts)
    assert tokenizer.eos_token_id not in expected[0]
    assert [tokenizer.decode(ids) for ids in expected] == texts
    expected_hash = hash_tokenizer(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert encode_documents(loaded, texts) == expected
    assert hash_tokenizer(loaded) == expected_hash
    # what others get from the tokenizer is as before
    assert loaded.encode("<|endoftext|>") == [loaded.eos_token_id]


def test_ids_may_leave_gaps() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert len(tokenizer) == 3
    assert num_ids(tokenizer) == len(token_byte_lengths(tokenizer)) == 70_001
    assert num_ids(BYTE_LEVEL) == len(BYTE_LEVEL)


def test_document_frame_and_padding() -> None:
    end = BYTE_LEVEL.eos_token_id
    assert document_frame(BYTE_LEVEL) == ([], [end])  # one token for both: once a document
    assert pad_id(BYTE_LEVEL) == end
    other = byte_level_tokenizer(text_documents(50))
    other.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    assert document_frame(other) == ([other.bos_token_id], [end])
    assert pad_id(other) == other.pad_token_id
    assert hash_tokenizer(other) != hash_tokenizer(BYTE_LEVEL)


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no eos_token: every training document ends with it"):
        load_tokenizer(str(tmp_path))
    save_word_tokenizer(tmp_path, eos_token="<end>")
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2


@pytest.mark.parametrize("path", ["/missing/directory", "./missing", "~/missing/directory", "a/b/c"])
def test_directories_that_are_not_there(path: str) -> None:
    with pytest.raises(InputError, match="no such directory") as caught:
        load_tokenizer(path)
    assert caught.value.where == path


def test_hub_names_and_directories_without_tokenizer(tmp_path: Path) -> None:
    for path in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(InputError, match="holds no tokenizer") as caught:
            load_tokenizer(path)
        assert caught.value.where == path and caught.value.remedy


DAMAGED = ["", "{", '{"version": "1.0"}', "[]", "[" * 100_000, '{"added_tokens": [], "model": 3}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_tokenizer_file(tmp_path: Path, content: str) -> None:
    save_word_tokenizer(tmp_path, eos_token="<end>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="install llmtrain[gguf] to read GGUF files")
    vocabulary = sorted(BYTE_LEVEL.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(BYTE_LEVEL.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([name for name, _ in vocabulary])
    writer.add_token_types([3 if name == "<|endoftext|>" else 1 for name, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    loaded = load_tokenizer(str(tmp_path), gguf_file="model.gguf")
    texts = text_documents(10)
    assert encode_documents(loaded, texts) == encode_documents(BYTE_LEVEL, texts)
    assert loaded.eos_token == "<|endoftext|>"


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path), gguf_file="model.gguf")


@pytest.mark.skipif(find_spec("fugashi") is not None, reason="fugashi is installed; uninstall it to see it missed")
def test_a_missing_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    config = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="needs a package that is not installed: .*fugashi") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.remedy
