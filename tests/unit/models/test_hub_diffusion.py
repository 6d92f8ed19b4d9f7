"""Diffusion models that are opened again, and the token that is their mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.models.diffusion import Diffusion, save_diffusion
from llmtrain.models.hub import open_model
from llmtrain.models.saving import save_pretrained
from tests import tiny
from tests.unit.models.test_hub import from_directory, logits

IDS = torch.arange(3, 23)[None]
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


def masked_with(token: str) -> Any:
    words = tiny.tokenizer()
    words.mask_token = token
    return words


def test_a_diffusion_model_goes_on_with_its_own_mask_token(tmp_path: Path) -> None:
    model = tiny.decoder().hf
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path)
    save_diffusion(Diffusion("masked", 7, shift=False), tmp_path)

    def opened(token: str, kind: str = "masked_diffusion", **settings: Any) -> PreTrainedModel:
        spec = {"kind": "pretrained", "path": str(tmp_path)}
        recipe = tiny.recipe(model=spec, algorithm={"kind": kind, "mask_token": token, **settings})
        blueprint = open_model(recipe, masked_with(token))
        blueprint.materialise(blueprint.decoder, torch.device("cpu"))
        return blueprint.decoder.hf

    assert torch.equal(logits(opened("w7")), logits(model))  # its trained row, too
    opened("w7", "block_diffusion", block_size=4)
    with pytest.raises(InputError, match=r"its mask token is 'w7', not 'w8'(.|\n)*write mask_token: 'w7'") as caught:
        opened("w8")
    assert caught.value.where == "algorithm.mask_token"
    both_ways = opened("w7")
    both_ways.config.is_causal = False  # as a run saves it
    both_ways.config.save_pretrained(tmp_path)
    assert not torch.equal(logits(opened("w7")), logits(model))
    assert torch.equal(logits(from_directory(tmp_path)), logits(model))  # as an autoregressive one


@pytest.mark.parametrize(
    ("token", "what"),
    [
        ("w7", "a word of the tokenizer's vocabulary"),
        ("</s>", "a token that begins or ends a text"),
        ("<s>", "a token that begins or ends a text"),
        ("the", "a plain word"),
        ("<pad>", "or stands for what has none"),  # the unknown token of this tokenizer
    ],
)
def test_a_mask_token_that_texts_hold_is_refused(token: str, what: str, tmp_path: Path) -> None:
    model = tiny.decoder().hf
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path)
    saved: dict[str, Any] = {"model": {"kind": "pretrained", "path": str(tmp_path)}}
    for spec in (saved, {}):
        recipe = tiny.recipe(algorithm={"kind": "masked_diffusion", "mask_token": token}, **spec)
        with pytest.raises(InputError, match=what) as caught:
            open_model(recipe, masked_with(token))
        assert caught.value.where == "algorithm.mask_token" and "that the model does not use" in str(caught.value)


def test_a_reserved_token_serves_as_the_mask(tmp_path: Path) -> None:
    model = tiny.decoder().hf
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path)
    words = tiny.tokenizer(95)
    words.add_tokens(["<|reserved|>"], special_tokens=True)
    words.mask_token = "<|reserved|>"
    recipe = tiny.recipe(
        model={"kind": "pretrained", "path": str(tmp_path)},
        algorithm={"kind": "masked_diffusion", "mask_token": "<|reserved|>"},
    )
    assert not open_model(recipe, words).new_rows  # it has a row, which stays
