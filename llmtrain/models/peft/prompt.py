"""Prompt learning: peft's encoders, in the decoder's own place for them."""

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain.errors import InputError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import config_field
from llmtrain.models.inputs import Prefix, VirtualTokens
from llmtrain.models.peft.config import refused_as_input_error
from llmtrain.recipe.schema import PrefixTuning, PromptTuning, PTuning, Recipe

# Their caches differ from layer to layer, and peft makes prefixes for them in ways of their own.
_OWN_CACHES = ("gemma2", "gemma3", "gemma4")


def put_in(
    spec: PromptTuning | PrefixTuning | PTuning,
    config: Any,
    blueprint: Blueprint,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """Gives the decoder the prompt of `spec`, and freezes all else."""
    decoder = blueprint.decoder
    _check(spec, blueprint, recipe)
    # Its values come with those of the decoder's own; what peft draws here is not used.
    place = torch.device("meta" if blueprint.is_empty else "cpu")
    with refused_as_input_error(), torch.random.fork_rng(devices=[]), place:
        model = get_peft_model(decoder.hf, config)
        planned: Any = model.prompt_encoder["default"]
    decoder.hf.requires_grad_(False)
    if isinstance(spec, PrefixTuning):
        decoder.prompt = Prefix(planned, config.num_virtual_tokens, config.num_layers, config.num_attention_heads)
    else:
        decoder.prompt = VirtualTokens(planned, config.num_virtual_tokens)
    text = spec.init_text if isinstance(spec, PromptTuning) else None
    blueprint.additions.append(_Encoder(blueprint, config, None if text is None else _ids(text, config, tokenizer)))
    return model


def _check(spec: PromptTuning | PrefixTuning | PTuning, blueprint: Blueprint, recipe: Recipe) -> None:
    config = blueprint.decoder.hf.config
    longest = config_field(config, "max_position_embeddings")
    if longest is not None and recipe.sequence_length + spec.num_virtual_tokens > longest:
        raise InputError(
            f"rows of {recipe.sequence_length} tokens with {spec.num_virtual_tokens} virtual ones before them, and the "
            f"model was made for {longest}",
            where="sequence_length",
            remedy=f"use {longest - spec.num_virtual_tokens} or less",
        )
    if not isinstance(spec, PrefixTuning):
        return
    if recipe.engine.activation_checkpointing != "none":
        raise InputError(
            "transformers drops keys and values that are put before the row where layers are computed again",
            where="engine.activation_checkpointing",
            remedy="set it to none, or use adapter.kind p_tuning",
        )
    kind = config.model_type
    if kind in TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING or kind.startswith(_OWN_CACHES):
        raise InputError(f"prefixes do not fit the cache of {kind}", where="adapter.kind", remedy="use p_tuning")


def _ids(text: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As many ids as there are virtual tokens: cut, or repeated, as peft does."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise InputError("the text has no tokens", where="adapter.init_text", remedy="give another, or leave it out")
    num: int = config.num_virtual_tokens
    return (ids * math.ceil(num / len(ids)))[:num]


class _Encoder:
    """The values of the prompt's network: a `blueprint.Addition`."""

    def __init__(self, blueprint: Blueprint, config: Any, ids: list[int] | None):
        self._decoder, self._config, self._ids = blueprint.decoder, config, ids

    @torch.no_grad()
    def fill(self, unit: Collection[nn.Module], device: torch.device) -> None:
        prompt = self._decoder.prompt
        assert prompt is not None
        if prompt not in unit:
            return
        planned = prompt.encoder
        encoder = new_encoder(self._config, self._decoder.hf.get_input_embeddings())
        if self._ids is not None:
            ids = torch.tensor(self._ids, device=device)
            encoder.embedding.weight.copy_(self._decoder.hf.get_input_embeddings()(ids))
        dtypes = {name: parameter.dtype for name, parameter in planned.named_parameters()}
        for name, parameter in encoder.named_parameters():
            parameter.data = parameter.data.to(device, dtypes[name])
        prompt.encoder = encoder.train(planned.training)


def new_encoder(config: Any, embeddings: nn.Module) -> Any:
    """peft's network for the prompt, with random weights."""
    kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    return kind(config, embeddings) if config.peft_type == "PROMPT_TUNING" else kind(config)


@torch.no_grad()
def learnt_prompt(config: Any, state: dict[str, Tensor], embeddings: nn.Module) -> Tensor:
    """[num, ...]: what peft saves of the prompt: what its network gives, and not the network.

    Args:
        state: the network's weights.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = new_encoder(copy.deepcopy(config), embeddings).eval()
    encoder.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()})
    learnt: Tensor = encoder(torch.arange(config.num_virtual_tokens).unsqueeze(0))[0]
    return learnt
