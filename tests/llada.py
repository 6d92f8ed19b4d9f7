"""A small random model in LLaDA's published layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny

MASK = "<|mdm_mask|>"
TOKENS = 90  # of the tokenizer: as in LLaDA-8B, the embedding has rows to spare
MASK_ID = TOKENS - 1
# The keys of LLaDA-8B's config.json, with small sizes.
CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 96,
    "eos_token_id": 1,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK_ID,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 96,
    "weight_tying": False,
}
IDS = torch.randint(3, TOKENS, (2, 13), generator=torch.Generator().manual_seed(5))


def weights_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors under the published names."""
    generator = torch.Generator().manual_seed(0)
    width, inner, head = config["d_model"], config["mlp_hidden_size"], config["d_model"] // config["n_heads"]
    keys, rows = config["n_kv_heads"] * head, config["embedding_size"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, width), "ln_f": (width,)}
    if not config["weight_tying"]:
        shapes["ff_out"] = (rows, width)
    for block in range(config["n_layers"]):
        of_block = {
            "q_proj": (width, width),
            "k_proj": (keys, width),
            "v_proj": (keys, width),
            "attn_out": (width, width),
            "ff_proj": (inner, width),
            "up_proj": (inner, width),
            "ff_out": (width, inner),
            "attn_norm": (width,),
            "ff_norm": (width,),
        }
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in of_block.items()}
    return {
        f"model.transformer.{name}.weight": (torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)).to(
            dtype
        )
        for name, shape in shapes.items()
    }


def write(directory: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A model directory as it is published, in two files with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | fields
    tensors = weights_of(CONFIG | {key: config[key] for key in ("weight_tying", "embedding_size")}, dtype)
    (directory / "config.json").write_text(json.dumps(config))
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, directory / file, {"format": "pt"})
    table = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> Any:
    """As LLaDA's, it has the token, and does not say that it is the mask."""
    words = tiny.tokenizer(MASK_ID)
    words.add_tokens([MASK], special_tokens=True)
    return words
