"""A tiny pretrained model, adapters of every kind for it, and their training without a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.blueprint import Blueprint
from llmtrain.models.hub import open_model
from llmtrain.models.peft import Adapter, adapt
from llmtrain.recipe.schema import Recipe
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(7))


def of_peft(kind: str, **config: Any) -> dict[str, Any]:
    return {"kind": "peft", "type": kind, "config": {"target_modules": ["q_proj", "up_proj"]} | config}


LORA: dict[str, Any] = {"kind": "lora", "r": 4, "alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, rslora": LORA | {"rslora": True},
    "lora, dora": LORA | {"dora": True},
    "lora, gaussian": LORA | {"init": "gaussian"},
    "lora, orthogonal": LORA | {"init": "orthogonal"},
    "lora, pissa": LORA | {"init": "pissa"},
    "lora, pissa, rslora": LORA | {"init": "pissa", "rslora": True},
    "lora, pissa, dora": LORA | {"init": "pissa", "dora": True},
    "lora, olora": LORA | {"init": "olora"},
    "lora, whole embeddings": LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora, by pattern": LORA | {"target_modules": r".*\.(q|v)_proj"},
    "lora, on the embedding": LORA | {"target_modules": ["embed_tokens", "q_proj"]},
    "ia3": {"kind": "ia3"},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 3},
    "prompt_tuning, text": {"kind": "prompt_tuning", "num_virtual_tokens": 5, "init_text": "w4 w5 w6"},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 3},
    "p_tuning, lstm": {"kind": "p_tuning", "num_virtual_tokens": 3, "encoder": "lstm", "encoder_hidden_size": 8},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 3},
    "prefix_tuning, projection": {"kind": "prefix_tuning", "num_virtual_tokens": 3, "projection": True},
    "MISS": of_peft("MISS", r=8),
    "LOHA": of_peft("LOHA", r=4),
    "LOKR": of_peft("LOKR", r=4),
    "OFT": of_peft("OFT", oft_block_size=8),
    "BOFT": of_peft("BOFT", boft_block_size=8),
    "HRA": of_peft("HRA", r=4),
    "VERA": of_peft("VERA", r=4),
    "VBLORA": of_peft("VBLORA", vector_length=16, num_vectors=8),
    "RANDLORA": of_peft("RANDLORA", r=4),
    "FOURIERFT": of_peft("FOURIERFT", n_frequency=50),
    "LN_TUNING": of_peft("LN_TUNING", target_modules=["input_layernorm"]),
    "SHIRA": of_peft("SHIRA", r=4),
    "C3A": of_peft("C3A", block_size=16),
    "ROAD": of_peft("ROAD", group_size=16),
    "DELORA": of_peft("DELORA", r=4),
    "HIRA": of_peft("HIRA", r=4),
    "GRALORA": of_peft("GRALORA", r=4),
    "WAVEFT": of_peft("WAVEFT", n_frequency=50),
    "TRAINABLE_TOKENS": of_peft("TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=IDS[0].tolist()[:4]),
}


def pretrained(directory: Path, **fields: Any) -> Path:
    """The tiny model and its tokenizer in files."""
    tiny.decoder(seed=3, **fields).hf.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def recipe(base: Path, adapter: dict[str, Any] | None, **overrides: Any) -> Recipe:
    sections: dict[str, Any] = {"model": {"kind": "pretrained", "path": str(base)}, "tokenizer": {"kind": "model"}}
    if adapter is not None:
        sections["adapter"] = adapter
        if adapter["kind"] == "prefix_tuning":
            sections["data"] = tiny.recipe().data.model_copy(update={"packing": "none"})
    return tiny.recipe(**sections | overrides)


def adapted(asked: Recipe) -> tuple[Blueprint, Adapter]:
    tokenizer = tiny.tokenizer()
    blueprint = open_model(asked, tokenizer)
    adapter = adapt(blueprint, asked, tokenizer)
    assert adapter is not None
    return blueprint, adapter


def materialised(asked: Recipe) -> tuple[nn.Module, Adapter]:
    blueprint, adapter = adapted(asked)
    blueprint.materialise(blueprint.decoder, CPU)
    return blueprint.decoder.eval(), adapter


def trained(model: nn.Module, steps: int = 8) -> list[float]:
    """The losses of a few steps on IDS."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    def loss(hidden: Tensor, head: nn.Linear) -> Tensor:
        return nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    value: Tensor = model(ids, torch.arange(ids.shape[1]).expand_as(ids), loss)
    return value


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    result: Tensor = model(ids, positions, lambda hidden, head: head(hidden))
    return result


def stream(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()
