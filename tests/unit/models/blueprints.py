"""Small blueprints of many architectures, and what is compared of them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtrain.models.blueprint import Blueprint
from llmtrain.models.hub import open_model
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]
HEAD = {"head_dim": 8}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1}
NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": tiny.LLAMA,
    "qwen3": tiny.LLAMA | HEAD,
    "mistral": tiny.LLAMA,
    "olmo2": tiny.LLAMA,
    "gemma2": tiny.LLAMA | HEAD,  # norms begin at zero
    "gemma3_text": tiny.LLAMA | HEAD,  # several rotary tables, a scaled embedding
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # tied; a parent initialises its child again
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": NEOX,
    "mamba2": MAMBA,  # scales in place what it drew
    "mixtral": tiny.LLAMA | {"num_local_experts": 4},
}
# Their files have other names or pieces than the model: a head by its old name, each expert apart.
CONVERTED = ("gpt_neox", "mixtral")
# Why they are built whole: the backbone writes into its layers; layers share weights; values of the constructor.
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "falcon_h1": (
        tiny.LLAMA | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
        "mup_vector has a value that only the model's constructor knows",
    ),
    "zamba2": (
        {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 64, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8,
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        "is shared by several layers",
    ),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "has a value that only the model's constructor knows"),
}  # fmt: skip


def from_config(architecture: str = "llama", fields: dict[str, Any] | None = None, **overrides: Any) -> Blueprint:
    shape = ARCHITECTURES[architecture] if fields is None else fields
    model = {"kind": "config", "architecture": architecture, "config": shape}
    return open_model(tiny.recipe(model=model, **overrides), tiny.tokenizer())


def made(blueprint: Blueprint) -> PreTrainedModel:
    blueprint.materialise(blueprint.decoder, CPU)
    return blueprint.decoder.hf


def built_whole(blueprint: Blueprint, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    hf = blueprint.decoder.hf
    return AutoModelForCausalLM.from_config(hf.config, dtype=hf.dtype)


def is_empty(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters()) and all(b.is_meta for b in module.buffers())


def is_real(module: nn.Module) -> bool:
    return not any(p.is_meta for p in module.parameters()) and not any(b.is_meta for b in module.buffers())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Parameters and all buffers, bit for bit."""
    for left, right in ((a.named_parameters(), b.named_parameters()), (a.named_buffers(), b.named_buffers())):
        mine, theirs = dict(left), dict(right)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Tensor = model.eval()(input_ids=IDS).logits
    return output
