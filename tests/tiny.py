"""Tiny tokenizers, recipes and models for tests that need no run and no text."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmtrain.distributed import World
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import Recipe
from tests.runs import RECIPE

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
VOCABULARY = 96
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """`size` words: <s>, </s>, <pad>, w3, w4, ..."""
    words = ["<s>", "</s>", "<pad>", *(f"w{number}" for number in range(3, size))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def recipe(**overrides: Any) -> Recipe:
    """The tiny recipe with other top-level keys; an override of a section replaces the whole section."""
    return Recipe.model_validate(RECIPE | overrides)


def decoder(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Decoder:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    shape = LLAMA if architecture == "llama" else {}
    config = AutoConfig.for_model(architecture, **({"vocab_size": VOCABULARY, "eos_token_id": 1} | shape | fields))
    return Decoder(AutoModelForCausalLM.from_config(config, dtype=dtype))
