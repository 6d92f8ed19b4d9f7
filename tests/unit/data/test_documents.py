"""What diffusion's fine-tuning makes of examples: filled with ends of text, answers noised and prompts not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.algorithms.masked_diffusion import MaskedDiffusion
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.chat import Tokens
from llmtrain.data.documents import Documents, Filled, Texts, documents_of
from llmtrain.data.loader import Loader
from llmtrain.data.tokenizer import pad_id
from llmtrain.recipe import schema
from llmtrain.recipe.schema import Recipe
from tests import tiny
from tests.chats import conversations, sft_recipe, write_jsonl

MASKED = {"kind": "masked_diffusion", "task": "sft"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chats")


def documents(directory: Path, algorithm: dict[str, Any], **overrides: Any) -> tuple[Recipe, Documents[Any]]:
    recipe = Recipe.model_validate(sft_recipe(directory, algorithm=algorithm, **overrides))
    return recipe, documents_of(recipe, prepare_tokenizer(recipe, cache_directory(None)).tokenizer)


def encoded(directory: Path, algorithm: dict[str, Any], **overrides: Any) -> list[Tokens]:
    recipe, reader = documents(directory, algorithm, **overrides)
    return reader.encode(list(reader.read(recipe.data.train[0])))


@pytest.mark.parametrize(("multiple", "length"), [(1, 96), (8, 96), (96, 96), (50, 60), (1000, 96)])
def test_examples_are_filled_with_ends_of_text_that_are_trained(directory: Path, multiple: int, length: int) -> None:
    plain = encoded(directory, MASKED)
    filled = encoded(directory, MASKED | {"eos_padding": multiple}, sequence_length=length)
    assert len(plain) == len(filled) == 60
    recipe, _ = documents(directory, MASKED)
    eos = prepare_tokenizer(recipe, cache_directory(None)).tokenizer.eos_token_id
    for before, after in zip(plain, filled, strict=True):
        num = len(before.ids)
        assert after.ids[:num] == before.ids and after.trained[:num] == before.trained
        assert set(after.ids[num:]) <= {eos} and all(after.trained[num:])
        # The next multiple, but no further than the row; what is longer than it stays as it is.
        expected = max(num, min(-(-num // multiple) * multiple, length))
        assert len(after.ids) == len(after.trained) == expected
    assert {len(tokens.ids) for tokens in filled} != {len(tokens.ids) for tokens in plain} or multiple == 1


def test_an_example_of_which_nothing_is_left_stays_empty() -> None:
    class Nothing:
        fingerprint, num_ids, chat_template, masked, judged = "x", 1, None, True, False

        def encode(self, documents: Any) -> list[Tokens]:
            return [Tokens([], []), Tokens([1], [True])]

    two: Any = [None, None]
    nothing: Any = Nothing()
    assert Filled(nothing, 9, 4, 8).encode(two) == [
        Tokens([], []),
        Tokens([1, 9, 9, 9], [True] * 4),
    ]


def test_the_fingerprint_changes_with_the_filling(directory: Path) -> None:
    asked: list[dict[str, Any]] = [MASKED, MASKED | {"eos_padding": 8}, MASKED | {"eos_padding": 16}]
    prints = [documents(directory, one)[1].fingerprint for one in asked]
    assert len(set(prints)) == 3
    assert documents(directory, asked[1], sequence_length=64)[1].fingerprint not in prints
    assert documents(directory, {"kind": "sft"})[1].fingerprint != prints[0]  # its tokenizer has no mask token


def test_pretraining_reads_texts(directory: Path) -> None:
    _, reader = documents(directory, {"kind": "masked_diffusion"})
    assert isinstance(reader, Texts) and not reader.masked


def test_last_blocks_of_block_diffusion_are_filled(directory: Path) -> None:
    """Also of texts, which go on in other rows, and of which every token is trained."""
    texts = tiny.recipe(algorithm={"kind": "block_diffusion", "block_size": 4}, sequence_length=8)
    reader = documents_of(texts, tiny.tokenizer())
    assert not reader.masked
    assert reader.encode([" ".join(["w5"] * num) for num in (1, 2, 3, 13)]) == [
        Tokens([0, 5, 1, 1], []),
        Tokens([0, 5, 5, 1], []),
        Tokens([0, 5, 5, 5, 1, 1, 1, 1], []),
        Tokens([0, *[5] * 13, 1, 1], []),
    ]
    for algorithm, multiple in (({"block_size": 8}, 8), ({"block_size": 8, "eos_padding": 24}, 24)):
        asked = {"kind": "block_diffusion", "task": "sft"} | algorithm
        assert {len(tokens.ids) % multiple for tokens in encoded(directory, asked, sequence_length=960)} == {0}


@pytest.mark.parametrize("eos_padding", [None, 16, 96])
def test_answers_are_noised_and_prompts_stay_clean(directory: Path, eos_padding: int | None) -> None:
    """The tokens that count are those of autoregressive fine-tuning, and the filling."""
    write_jsonl(directory / "chats.jsonl", conversations(60))
    algorithm = MASKED | ({} if eos_padding is None else {"eos_padding": eos_padding})
    recipe = Recipe.model_validate(sft_recipe(directory, algorithm=algorithm, sequence_length=96))
    tokenizer = prepare_tokenizer(recipe, cache_directory(None)).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache_directory(None))
    assert isinstance(recipe.algorithm, schema.MaskedDiffusion)
    process = MaskedDiffusion(recipe.algorithm, 0, 4, tokenizer.mask_token_id, pad_id(tokenizer))
    loader = Loader(datasets.train, datasets.order(0), 4, 2, 0, 1)
    masked = torch.zeros(())
    for step in range(4):
        for micro in loader.micro_batches(step):
            ids, trained = micro.tensors["input_ids"], micro.tensors["trained"]
            noised = process.noised(step, micro)
            assert noised.weights["policy"] == trained.sum() > 0
            changed = noised.tensors["input_ids"] != ids
            assert not changed[~trained].any()
            masked += changed.sum() / trained.sum() / 8
            # What a target of autoregressive training is, is a token to predict here, one place further on.
            as_targets = (micro.tensors["targets"] != -100)[:, :-1]
            assert torch.equal(as_targets, trained[:, 1:])
            for row in range(2):
                text = tokenizer.decode(ids[row][trained[row]])
                assert "<|im_start|>user" not in text and "<|im_end|>" in text
    assert 0.2 < masked < 0.8
