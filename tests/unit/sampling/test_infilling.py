"""Prompts with holes."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.errors import InputError
from llmtrain.models.saved import Saved, load_saved
from llmtrain.sampling.infilling import check_no_holes, encode_prompt, holes
from tests.chats import write_chat_model
from tests.diffusion import MASK, MASKED, MASKED_SHIFTED, UNIFORM, write_diffusion_model
from tests.saved import write_model


@pytest.fixture
def masked(tmp_path: Path) -> Saved:
    return load_saved(str(write_diffusion_model(tmp_path / "masked", MASKED)))


def test_a_hole_is_so_many_masks(masked: Saved) -> None:
    ids = encode_prompt(masked, "w7 <|mask:3|> w8 w95 <|mask:1|>", "here")
    assert ids == [0, 7, *[MASK] * 3, 8, MASK, MASK]
    assert holes(ids, MASK) == [2, 3, 4, 6, 7]
    assert holes(ids, None) == []
    assert encode_prompt(masked, "w7 w8", "here") == [0, 7, 8]


def test_a_space_before_a_hole_belongs_to_it(masked: Saved, tmp_path: Path) -> None:
    """Else a token of the space alone would stand before the hole, and before what fills it another."""
    tokenizer = write_chat_model(tmp_path / "model")
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    mask = tokenizer.mask_token_id
    saved = replace(masked, tokenizer=tokenizer, diffusion=replace(MASKED, mask_token_id=mask))
    ids = encode_prompt(saved, "the quick <|mask:2|> jumps", "here")
    filled = [tokenizer.convert_tokens_to_ids(" fox") if token == mask else token for token in ids]
    assert tokenizer.decode(filled, skip_special_tokens=True).strip() == "the quick fox fox jumps"
    assert filled == encode_prompt(saved, "the quick fox fox jumps", "here")
    assert ids == encode_prompt(saved, "the quick <|mask|><|mask|> jumps", "here")  # by the token's own name


@pytest.mark.parametrize("text", ["w7 <|mask:0|>", "w7 <|mask:-1|>", "w7 <|mask:five|>", "w7 <|mask:|>", "<|mask:65|>"])
def test_what_is_no_hole(masked: Saved, text: str) -> None:
    with pytest.raises(InputError, match="is no hole: it takes a number of tokens from 1 to 64"):
        encode_prompt(masked, text, "here")


def test_models_that_fill_no_holes(tmp_path: Path) -> None:
    autoregressive = load_saved(str(write_model(tmp_path / "ar")))
    with pytest.raises(InputError, match="it is autoregressive"):
        encode_prompt(autoregressive, "w7 <|mask:2|>", "here")
    uniform = load_saved(str(write_diffusion_model(tmp_path / "uniform", UNIFORM)))
    with pytest.raises(InputError, match="no mask token"):
        encode_prompt(uniform, "w7 <|mask:2|>", "here")
    assert encode_prompt(uniform, "w7", "here") == [0, 7]


def test_a_shifted_model_needs_a_first_token(tmp_path: Path) -> None:
    shifted = load_saved(str(write_diffusion_model(tmp_path / "shifted", MASKED_SHIFTED)))
    assert encode_prompt(shifted, "<|mask:2|> w8", "here") == [0, MASK, MASK, 8]
    shifted.tokenizer.bos_token = None
    with pytest.raises(InputError, match="begins with a hole"):
        encode_prompt(shifted, "<|mask:2|> w8", "here")


def test_conversations_have_no_holes(masked: Saved) -> None:
    check_no_holes(masked, [0, 7, 8], "here")
    with pytest.raises(InputError, match="mask token"):
        check_no_holes(masked, [0, 7, MASK], "here")
