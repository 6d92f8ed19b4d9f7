"""Weights that come a layer at a time are those of a model that is built whole."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from llmtrain.errors import TrainingError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from tests import tiny
from tests.unit.models.blueprints import (
    ARCHITECTURES,
    CPU,
    WHOLE,
    assert_same,
    built_whole,
    from_config,
    is_empty,
    is_real,
    logits,
    made,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_a_layer_at_a_time_and_are_those_of_the_whole(architecture: str) -> None:
    parts, whole = from_config(architecture), from_config(architecture)
    state = torch.get_rng_state()
    layers = parts.layers
    assert is_empty(parts.decoder) and len(layers) == 2
    # in another order, since no unit depends on another
    parts.materialise(layers[1], CPU)
    assert is_real(layers[1]) and is_empty(layers[0])
    parts.materialise(layers[0], CPU)
    assert parts.decoder.hf.get_input_embeddings().weight.is_meta
    assert_same(made(parts), made(whole))
    assert is_real(parts.decoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert logits(parts.decoder.hf).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_those_that_transformers_gives(architecture: str) -> None:
    """Buffers (rotary tables, masks) bit for bit; parameters by their mean and spread."""
    blueprint = from_config(architecture)
    model, reference = made(blueprint), built_whole(blueprint)
    tables = dict(model.named_buffers())
    assert tables.keys() == dict(reference.named_buffers()).keys()
    for name, buffer in reference.named_buffers():
        assert torch.equal(tables[name], buffer), name
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        other = expected[name]
        assert (p.shape, p.dtype, p.requires_grad) == (other.shape, other.dtype, other.requires_grad), name
        spread = max(p.std().item(), other.std().item())
        error = spread / math.sqrt(p.numel())  # of the mean; of the spread it is less
        assert abs(p.mean().item() - other.mean().item()) <= 6 * error + 1e-7, name
        assert abs(p.std().item() - other.std().item()) <= 6 * error + 1e-7, name
    pad = model.config.pad_token_id
    assert (model.get_input_embeddings().weight[pad] == 0).all() == (
        reference.get_input_embeddings().weight[pad] == 0
    ).all()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_tables(rope: dict[str, Any]) -> None:
    for precision in ("fp32", "bf16"):
        blueprint = from_config(fields=tiny.LLAMA | {"rope_parameters": rope}, precision=precision)
        assert is_empty(blueprint.decoder)
        table, expected = made(blueprint).model.rotary_emb, built_whole(blueprint).model.rotary_emb
        assert torch.equal(table.inv_freq, expected.inv_freq) and table.inv_freq.dtype == torch.float32
        assert torch.equal(table.original_inv_freq, expected.original_inv_freq)
        assert table.attention_scaling == expected.attention_scaling


def test_the_seed_decides() -> None:
    first, same, other = (made(from_config(seed=seed)) for seed in (3, 3, 4))
    assert_same(first, same)
    a, b = first.model.layers[0].mlp, first.model.layers[1].mlp
    assert not torch.equal(a.up_proj.weight, b.up_proj.weight)
    assert not torch.equal(a.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_weights_of_bf16() -> None:
    model = made(from_config(precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights_stay_one() -> None:
    blueprint = from_config(fields=tiny.LLAMA | {"tie_word_embeddings": True})
    num_parameters = blueprint.decoder.num_parameters()
    model = made(blueprint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert blueprint.decoder.num_parameters() == num_parameters
    assert is_real(blueprint.decoder)


def test_what_is_frozen_stays_so_and_marks_on_tensors_are_kept() -> None:
    blueprint = from_config()
    weight = blueprint.decoder.hf.get_input_embeddings().weight.requires_grad_(False)
    weight.mark = "seen"
    made(blueprint)
    parameters = dict(blueprint.decoder.named_parameters())
    assert [name for name, p in parameters.items() if not p.requires_grad] == ["hf.model.embed_tokens.weight"]
    assert [vars(p) for p in parameters.values() if vars(p)] == [{"mark": "seen"}]


def test_only_layers_and_the_whole_are_materialised() -> None:
    blueprint = from_config()
    with pytest.raises(AssertionError, match="by its layers, or whole"):
        blueprint.materialise(blueprint.decoder.hf.model.norm, CPU)


def test_a_real_decoder_is_only_moved() -> None:
    decoder = tiny.decoder()
    before = {name: (p, p.clone()) for name, p in decoder.named_parameters()}
    blueprint = Blueprint(decoder, seed=9)
    blueprint.materialise(blueprint.layers[0], CPU)
    blueprint.materialise(decoder, CPU)
    for name, p in decoder.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]), name


# -------------------------------------------------------------- what cannot be made in parts


@pytest.mark.parametrize("architecture", WHOLE)
def test_others_are_built_whole(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, reason = WHOLE[architecture]
    with caplog.at_level(logging.INFO):
        blueprint = from_config(architecture, fields, seed=3)
    assert is_real(blueprint.decoder)
    assert "builds the whole model" in caplog.text and reason in caplog.text
    model = made(blueprint)
    assert_same(model, built_whole(blueprint, seed=3))
    assert logits(model).isfinite().all()


class _Scaled(nn.Module):
    """A norm with what transformers' initialisation does not know."""

    def __init__(self, kind: str):
        super().__init__()
        if kind == "parameter":
            self.gain = nn.Parameter(torch.full((3,), 2.0))
        elif kind == "buffer":
            self.register_buffer("steps", torch.ones(3, dtype=torch.int64))
        elif kind == "attribute":
            self.tables = [torch.ones(3)]


def llama_on_meta(change: Callable[[PreTrainedModel], None]) -> Blueprint:
    config = AutoConfig.for_model("llama", vocab_size=tiny.VOCABULARY, **tiny.LLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        change(model)
    return Blueprint(Decoder(model))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("parameter", "hf.model.layers.1.scaled.gain has a value that only the model's constructor knows"),
        ("buffer", "hf.model.layers.1.scaled.steps has a value that only the model's constructor knows"),
        ("attribute", "hf.model.layers.1.scaled keeps a tensor that is neither a parameter nor a buffer"),
    ],
)
def test_values_that_only_the_constructor_knows_are_seen(kind: str, reason: str) -> None:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].scaled = _Scaled(kind)

    assert llama_on_meta(change).obstacle() == reason
    assert llama_on_meta(lambda model: None).obstacle() is None


@pytest.mark.parametrize(
    "kind", ["scaled in place", "copied from the constructor's", "of another layer", "an operation"]
)
def test_an_initialisation_that_needs_values_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaForCausalLM._init_weights

    def initialise(self: PreTrainedModel, module: nn.Module) -> None:
        if kind == "scaled in place" and isinstance(module, LlamaRMSNorm):
            module.weight.mul_(2)
            return
        if kind == "copied from the constructor's" and isinstance(module, LlamaDecoderLayer):
            module.post_attention_layernorm.weight.copy_(module.mystery * 1)
        if kind == "of another layer" and isinstance(module, LlamaForCausalLM):
            module.model.layers[0].mlp.up_proj.weight.data.zero_()
        if kind == "an operation" and isinstance(module, LlamaMLP):
            module.up_proj.weight.sum().item()
        original(self, module)

    # each transformers model within the model has an _init_weights
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaPreTrainedModel._init_weights", initialise)

    def change(model: PreTrainedModel) -> None:
        if kind == "copied from the constructor's":
            model.model.layers[0].mystery = nn.Parameter(torch.ones(32))

    blueprint = llama_on_meta(change)
    assert blueprint.obstacle() is not None
    if kind in ("scaled in place", "copied from the constructor's"):
        with pytest.raises(TrainingError, match="weights without a value"):
            made(blueprint)


def test_a_constructor_that_wants_values(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original = LlamaMLP.__init__

    def construct(self: nn.Module, config: Any) -> None:
        original(self, config)  # type: ignore[arg-type]
        assert torch.ones(3).sum().item() == 3

    monkeypatch.setattr(LlamaMLP, "__init__", construct)
    with caplog.at_level(logging.INFO):
        assert is_real(from_config().decoder)
    assert "its constructor wants values" in caplog.text
