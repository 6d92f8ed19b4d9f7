"""The trained tokenizer is sentencepiece's, and gives back any text."""

import filecmp
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtrain.data.sources import read_documents
from llmtrain.data.tokenizer import encode_documents, load_tokenizer, token_byte_lengths
from llmtrain.data.tokenizer_training import MODEL_FILE, train_sentencepiece
from llmtrain.errors import InputError
from llmtrain.recipe.schema import PythonSource, SentencePieceTokenizer
from tests.unit.data.corpora import AWKWARD_TEXTS, text_documents, unicode_text

SPECIAL = ["<|user|>", "<mask>"]
MODEL_TYPES = ["bpe", "unigram"]


def spec(model_type: str, **more: object) -> SentencePieceTokenizer:
    values = {"kind": "sentencepiece", "vocab_size": 1500, "model_type": model_type, "special_tokens": SPECIAL}
    return SentencePieceTokenizer.model_validate({**values, "max_bytes": 600_000, **more})


@pytest.fixture(scope="module")
def python_files() -> list[str]:
    """Every twentieth file of the standard library: real code and English."""
    return list(read_documents(PythonSource.model_validate({"kind": "python"})))[::20]


@pytest.fixture(scope="module")
def directory_of(python_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tokenizer of each model type, trained once."""
    made: dict[str, Path] = {}

    def directory(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            train_sentencepiece(python_files, spec(model_type), made[model_type])
        return made[model_type]

    return directory


@pytest.fixture(params=MODEL_TYPES)
def directory(request: pytest.FixtureRequest, directory_of: Callable[[str], Path]) -> Path:
    return directory_of(request.param)


@pytest.fixture
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(directory))


def check_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    (plain,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(plain) == text
    assert not set(plain) & set(tokenizer.all_special_ids)
    assert token_byte_lengths(tokenizer)[plain].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_awkward_texts_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_any_text_round_trips(directory_of: Callable[[str], Path], model_type: str) -> None:
    tokenizer = load_tokenizer(str(directory_of(model_type)))
    fragments = st.sampled_from([*AWKWARD_TEXTS, "<s>", "<0x41>", " ", "\n", "\t", "▁", "return"])

    @given(st.lists(unicode_text | fragments, max_size=6).map("".join))
    def check(text: str) -> None:
        check_round_trip(tokenizer, text)

    check()


def test_bpe_ids_are_those_of_sentencepiece(directory_of: Callable[[str], Path], python_files: list[str]) -> None:
    directory = directory_of("bpe")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / MODEL_FILE))
    texts = [*python_files, *(text for text in AWKWARD_TEXTS if "▁" not in text)]
    assert encode_documents(load_tokenizer(str(directory)), texts) == [processor.encode(text) for text in texts]


def test_unigram_ids_are_those_of_sentencepiece(directory_of: Callable[[str], Path], python_files: list[str]) -> None:
    """Where they differ the two paths score the same: sentencepiece adds scores up in 32 bits."""
    directory = directory_of("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / MODEL_FILE))
    texts = [line for text in python_files for line in text.splitlines(keepends=True)]
    texts += [text for text in AWKWARD_TEXTS if "▁" not in text]
    num_different = 0
    for text, ids in zip(texts, encode_documents(load_tokenizer(str(directory)), texts), strict=True):
        expected = processor.encode(text)
        if ids != expected:
            num_different += 1
            scores = [sum(map(processor.get_score, path)) for path in (ids, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3), text
    assert num_different <= len(texts) / 100


def test_code_is_cut_into_words_and_runs_of_spaces(directory_of: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(str(directory_of("bpe")))
    ids = tokenizer.encode("if self:\n        return\n\n    def", add_special_tokens=False)
    pieces = [tokenizer.decode([index]) for index in ids]
    assert pieces == ["if", " self", ":\n", "        ", "return", "\n\n", "    ", "def"]


def test_training_is_deterministic_and_ignores_the_order(
    directory: Path, python_files: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_type = request.node.callspec.params["directory"]
    train_sentencepiece(reversed(python_files), spec(model_type), tmp_path)
    names = sorted(path.name for path in directory.iterdir())
    assert names == [MODEL_FILE, "tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(directory, tmp_path, names, shallow=False) == (names, [], [])


def test_special_tokens_are_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    names = ["<unk>", "<s>", "</s>", "<pad>", *SPECIAL]
    assert len(tokenizer) == 1500
    assert tokenizer.convert_tokens_to_ids(names) == list(range(6))
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == tuple(names[:4])
    assert tokenizer.encode("<|user|>hello</s>", add_special_tokens=False)[0] == 4  # asked for, not in a corpus
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.decode(tokenizer.encode("  hello <x>"), skip_special_tokens=True) == "  hello <x>"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mamba2"])
def test_it_stays_itself_beside_a_model(tokenizer: PreTrainedTokenizerBase, model_type: str, tmp_path: Path) -> None:
    """transformers has tokenizer classes of its own for model types, some of which would add spaces."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD_TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        check_round_trip(loaded, text)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("documents", "values", "message"),
    [
        (["hello world\n" * 9], {"vocab_size": 4096}, "Vocabulary size too high (4096)"),
        (["hello world\n" * 9], {"vocab_size": 270, "special_tokens": []}, "smaller than required_chars. 270 vs 29"),
        ([], {}, "no text"),
        (["▁\0"], {}, "no text"),
        (["hello"], {"special_tokens": ["<s>"]}, "'<s>' is there already"),
        (["hello"], {"special_tokens": ["<a>", "<a>"]}, "'<a>' is there already"),
        (["hello"], {"special_tokens": ["<0x41>"]}, "'<0x41>' is there already"),
        (["hello"], {"special_tokens": ["a b"]}, "has a space in it"),
        (["hello"], {"special_tokens": [""]}, "is empty"),
        (["hello"], {"special_tokens": ["<b>", "a"]}, "'a' is a single character"),
        (["hello"], {"special_tokens": ["<▅>"]}, "that sentencepiece keeps for itself"),
        (["hello"], {"vocab_size": 10**12}, "cannot make a vocabulary of 1000000000000"),
    ],
)
def test_what_cannot_be_trained(
    model_type: str, documents: list[str], values: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        train_sentencepiece(documents, spec(model_type, **values), tmp_path)
    assert message in caught.value.message
    assert caught.value.where and caught.value.where.startswith(("tokenizer", "data.train")) and caught.value.remedy
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_characters_that_the_trainer_reserves_lose_no_text(model_type: str, tmp_path: Path) -> None:
    """One U+2585 used to make sentencepiece drop the whole sentence."""
    documents = [f"{text}▅{text}\0{text}▁{text}" for text in text_documents(200)]
    train_sentencepiece(documents, spec(model_type, vocab_size=400), tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    check_round_trip(tokenizer, documents[0])
