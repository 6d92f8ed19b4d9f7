"""Weights in 4 bits, by bitsandbytes."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.recipe.schema import ModelFromPretrained, Recipe


def in_four_bits(spec: ModelFromPretrained, recipe: Recipe, new_rows: range, rows: int) -> dict[str, Any]:
    """from_pretrained's options for weights in 4 bits on this rank's device (QLoRA, arXiv 2305.14314).

    Args:
        new_rows: of the embedding, which is not in 4 bits, for the tokens that the recipe adds.
        rows: that the embedding has.
    """
    if spec.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "bitsandbytes is not installed", where="model.quantization", remedy="pip install 'llmtrain[qlora]'"
        )
    if new_rows.stop > rows:
        raise InputError(
            f"a model in 4 bits does not grow: it has {rows} embeddings, and {new_rows.stop} are needed",
            where="tokenizer.add_tokens" if recipe.mask_token is None else "algorithm.mask_token",
            remedy="add the tokens to the model first, name one that it has, or set model.quantization: none",
        )
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    compute = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return {"quantization_config": settings, "device_map": {"": device}}


def is_quantised(model: PreTrainedModel) -> bool:
    return model.config.to_dict().get("quantization_config") is not None
