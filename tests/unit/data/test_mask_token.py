"""The token that stands for a masked one: added where the tokenizer has none of its name."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.build import PreparedTokenizer, prepare_tokenizer
from llmtrain.data.tokenizer import encode_documents, num_ids
from llmtrain.errors import InputError
from llmtrain.recipe.loading import load_recipe
from tests import tiny
from tests.runs import write_recipe

MASK = "<|mask|>"


def prepared(directory: Path, algorithm: dict[str, Any], **overrides: Any) -> PreparedTokenizer:
    sections: dict[str, Any] = {"tokenizer": {"kind": "pretrained", "path": str(directory / "words")}}
    recipe = load_recipe(write_recipe(directory, algorithm=algorithm, **sections | overrides)).recipe
    return prepare_tokenizer(recipe, directory / "cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path


@pytest.mark.parametrize(
    "algorithm",
    [
        {"kind": "masked_diffusion"},
        {"kind": "block_diffusion", "block_size": 4},
        {"kind": "score_entropy"},
    ],
    ids=lambda algorithm: str(algorithm["kind"]),
)
def test_it_is_added_as_the_last_one(algorithm: dict[str, Any], directory: Path) -> None:
    tokenizer, num_new = prepared(directory, algorithm)
    assert num_new == 1
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK, tiny.VOCABULARY)
    assert num_ids(tokenizer) == tiny.VOCABULARY + 1
    # The same characters in a text are text, which can be predicted; the token cannot.
    assert tokenizer.mask_token_id not in encode_documents(tokenizer, [f"w4 {MASK} w5"])[0]


@pytest.mark.parametrize(
    "algorithm", [{"kind": "causal_lm"}, {"kind": "score_entropy", "noise": "uniform"}], ids=["causal", "uniform"]
)
def test_nothing_is_added_where_nothing_is_masked(algorithm: dict[str, Any], directory: Path) -> None:
    tokenizer, num_new = prepared(directory, algorithm)
    assert num_new == 0
    assert num_ids(tokenizer) == tiny.VOCABULARY


def test_one_that_is_there_is_taken(directory: Path) -> None:
    tokenizer, num_new = prepared(directory, {"kind": "masked_diffusion", "mask_token": "w7"})
    assert (num_new, tokenizer.mask_token_id) == (0, 7)


def test_it_comes_after_other_new_tokens(directory: Path) -> None:
    spec = {"kind": "pretrained", "path": str(directory / "words"), "add_tokens": ["<|user|>"]}
    tokenizer, num_new = prepared(directory, {"kind": "masked_diffusion"}, tokenizer=spec)
    assert num_new == 2
    assert tokenizer.convert_ids_to_tokens([tiny.VOCABULARY, tiny.VOCABULARY + 1]) == ["<|user|>", MASK]


def test_a_tokenizer_that_is_trained_gets_it_on_top(directory: Path) -> None:
    tokenizer, num_new = prepared(
        directory, {"kind": "masked_diffusion"}, tokenizer={"kind": "sentencepiece", "vocab_size": 400}
    )
    assert num_new == 1
    assert tokenizer.mask_token_id == num_ids(tokenizer) - 1


def test_a_name_that_is_none(directory: Path) -> None:
    with pytest.raises(InputError, match="begins or ends with a space") as caught:
        prepared(directory, {"kind": "masked_diffusion", "mask_token": " x"})
    assert caught.value.where == "algorithm.mask_token"
