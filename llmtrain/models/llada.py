"""LLaDA's published layout: a Llama under names of its own (GSAI-ML/LLaDA-8B-Base and -Instruct, arXiv 2502.09992).

The blocks are Llama's: RMS norms before attention and feed-forward, rotary embeddings over halves of a head, grouped
keys and values, no biases, and down(silu(gate x) * up x), where gate is called ff_proj, up up_proj and down ff_out.
What differs is attention, which has no causal mask, and that is the algorithm's business here. So such a directory
is opened as transformers' Llama, without the code that comes with it, and its weights are read by other names.

In float32 the two compute the same. In bf16 LLaDA turns queries and keys in float32 (`rope_full_precision`) and Llama
in bf16, a difference in rounding.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtrain.data.tokenizer import pad_id
from llmtrain.errors import InputError
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.saving import save_tensors

MODEL_TYPE = "llada"
# Where transformers finds the code that reads an exported directory, with trust_remote_code and a network.
_CODE = "GSAI-ML/LLaDA-8B-Base"

_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_IN_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
# As transformers' from_pretrained takes it: patterns of their names, and what stands in ours.
KEY_MAPPING = {rf"^model\.transformer\.{theirs}\.": f"{ours}." for theirs, ours in _OUTSIDE.items()} | {
    rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
    for theirs, ours in _IN_BLOCK.items()
}

# What a Llama is, and the value of a key that is not there, which is that of the published code.
_FIXED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "block_type": (("llama",), "sequential"),
    "activation_type": (("silu",), "swiglu"),
    "layer_norm_type": (("rms",), "default"),
    "layer_norm_with_affine": ((True,), True),
    "attention_layer_norm": ((False,), False),
    "bias_for_layer_norm": ((False, None), None),
    "include_bias": ((False,), False),
    "include_qkv_bias": ((False, None), False),
    "input_emb_norm": ((False,), False),
    "scale_logits": ((False,), False),
    "rope": ((True,), False),
    "alibi": ((False,), False),
    "block_group_size": ((1,), 1),
    "multi_query_attention": ((False, None), None),  # n_kv_heads says it
    "attention_dropout": ((0, None), 0.1),
    "residual_dropout": ((0, None), 0.1),
    "embedding_dropout": ((0, None), 0.1),
}
# Of the layout, beside the sizes: what its code wants to be told, as the published models have it.
_AS_PUBLISHED = {
    "alibi_bias_max": 8.0,
    "attention_layer_norm_with_affine": True,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "mlp_ratio": 4,
    "rope_full_precision": True,
    "use_cache": False,
}


def llama_name(name: str) -> str:
    """Llama's name of a parameter; other names stay as they are."""
    for pattern, replacement in KEY_MAPPING.items():
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new
    return name


def llada_name(name: str) -> str:
    """LLaDA's name of a Llama's parameter."""
    if (inside := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)) is not None:
        theirs = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
        return f"model.transformer.blocks.{inside[1]}.{theirs[inside[2]]}.weight"
    theirs = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    return f"model.transformer.{theirs[name.removesuffix('.weight')]}.weight"


def llama_config(fields: Mapping[str, Any], where: str) -> LlamaConfig:
    """The Llama that a config.json of model type llada describes.

    Args:
        where: what to name in errors.

    Raises:
        InputError: it is a variant that no Llama is, or a size is missing or none.
    """
    for key, (allowed, default) in _FIXED.items():
        value = fields.get(key, default)
        if value not in allowed:
            given = f"is {value!r}" if key in fields else f"is not given, which means {default!r}"
            raise InputError(
                f"{key} {given} in its config.json, and of LLaDA's variants the published one is read: {allowed[0]!r}",
                where=where,
                remedy="give a model of GSAI-ML/LLaDA-8B's configuration"
                + ("; a dropout is none of the weights' business: set it to 0.0" if "dropout" in key else ""),
            )
    width, heads = _size(fields, "d_model", where), _size(fields, "n_heads", where)
    inner = _size(fields, "mlp_hidden_size", where) if fields.get("mlp_hidden_size") is not None else None
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "").removeprefix("torch.")
    config = LlamaConfig(
        vocab_size=_size(fields, "embedding_size" if fields.get("embedding_size") is not None else "vocab_size", where),
        hidden_size=width,
        intermediate_size=inner or _size(fields, "mlp_ratio", where, default=4) * width,
        num_hidden_layers=_size(fields, "n_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_size(fields, "n_kv_heads", where, default=heads),
        max_position_embeddings=_size(fields, "max_sequence_length", where, default=1024),
        rms_norm_eps=_number(fields, "rms_norm_eps", where, default=1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": _number(fields, "rope_theta", where, default=1e4)},
        tie_word_embeddings=bool(fields.get("weight_tying", True)),
        bos_token_id=None,
        eos_token_id=fields.get("eos_token_id"),
        pad_token_id=fields.get("pad_token_id"),
        dtype=dtype or None,
    )
    config.is_causal = False  # so that transformers' own forward attends both ways, too
    return config


def _size(fields: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = default if fields.get(key) is None else fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r} in its config.json, and no size", where=where, remedy="correct it")
    return value


def _number(fields: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = fields.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{key} is {value!r} in its config.json, and no number above 0", where=where)
    return float(value)


def diffusion_of(fields: Mapping[str, Any], where: str) -> Diffusion:
    """How a model of this config.json is to be used."""
    mask = fields.get("mask_token_id")
    if not isinstance(mask, int) or isinstance(mask, bool) or mask < 0:
        raise InputError(
            f"mask_token_id is {mask!r} in its config.json",
            where=where,
            remedy="set it to the id of the token that stands for a masked one (126336 in LLaDA-8B)",
        )
    return Diffusion("masked", mask, shift=False)


def save_llada(
    model: PreTrainedModel,
    diffusion: Diffusion | None,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    shard_bytes: int,
) -> None:
    """Writes a model in LLaDA's layout: config, safetensors, tokenizer.

    Raises:
        InputError: it is no Llama that this layout can hold, or no masked diffusion model.
    """
    config = _llada_config(model, diffusion, tokenizer)
    dtype = save_tensors(_named(model), directory, shard_bytes)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _named(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    # named_parameters gives a tied head once, as the embedding; the layout does the same
    return ((llada_name(name), tensor) for name, tensor in model.named_parameters())


def _llada_config(
    model: PreTrainedModel, diffusion: Diffusion | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    config: Any = model.config
    if not isinstance(config, LlamaConfig) or config.model_type != "llama":
        raise _refused(f"it is a {config.model_type}, and LLaDA is a llama", "export it without --layout")
    if diffusion is None or diffusion.process != "masked" or diffusion.shift:
        kind = "autoregressive" if diffusion is None else f"a {diffusion.process} diffusion model"
        shifted = " with shift" if diffusion is not None and diffusion.shift else ""
        raise _refused(
            f"it is {kind}{shifted}, and LLaDA's layout is of masked diffusion without shift",
            "export it without --layout, or train it with algorithm.kind masked_diffusion and shift false",
        )
    rope = dict(config.rope_parameters)
    own = config.hidden_size // config.num_attention_heads
    variants = {
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "hidden_act": (config.hidden_act, "silu"),
        "head_dim": (config.head_dim, own),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for key, (value, allowed) in variants.items():
        if value != allowed:
            raise _refused(
                f"its {key} is {value!r}, and the layout knows {allowed!r} only", "export it without --layout"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": f"{_CODE}--configuration_llada.LLaDAConfig",
            "AutoModel": f"{_CODE}--modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": f"{_CODE}--modeling_llada.LLaDAModelLM",
        },
        **{key: allowed[0] for key, (allowed, _) in _FIXED.items() if key != "multi_query_attention"},
        "multi_query_attention": None,
        **_AS_PUBLISHED,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": config.intermediate_size,
        "max_sequence_length": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "vocab_size": rows,
        "embedding_size": rows,
        "weight_tying": bool(config.tie_word_embeddings),
        "mask_token_id": diffusion.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_id(tokenizer),
    }


def _refused(message: str, remedy: str) -> InputError:
    return InputError(f"the model cannot be written in LLaDA's layout: {message}", where="--layout", remedy=remedy)
