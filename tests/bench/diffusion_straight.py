"""The straight implementation of masked and block diffusion: what one would write by hand from the papers.

Whole logits of every place, dense masks, for blocks the noisy and the clean copy in one forward with one rate a
row; transformers' model, torch's AdamW. The rows are those of ours.

usage: python -m tests.bench.diffusion_straight WORK KIND PRECISION WARMUP
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.observe.memory import peak_memory_bytes
from tests.bench.pretrain import ROWS_PER_STEP

BLOCK = 16


def main(work: Path, kind: str, precision: str, warmup: int) -> None:
    with np.load(work / "rows.npz") as rows:
        ids = torch.from_numpy(rows["input_ids"]).view(-1, ROWS_PER_STEP, rows["input_ids"].shape[1])
        positions = torch.from_numpy(rows["position_ids"]).view_as(ids)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / "model")
    mask_id = config.vocab_size
    config.vocab_size += 1
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = {"masked": masked_loss, "block": block_loss}[kind]
    cast = contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
    ends = []
    for step in range(len(ids)):
        with cast:
            loss = loss_of(model, ids[step], positions[step], mask_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.time())
    tokens = ids[0].numel() * (len(ends) - 1 - warmup)
    result = {
        "tokens_per_second": tokens / (ends[-1] - ends[warmup]),
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
    }
    print(json.dumps(result))


def masked_loss(model: torch.nn.Module, ids: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    documents = (positions == 0).cumsum(1)
    rates = 1e-3 + (1 - 1e-3) * torch.rand(len(ids), 1)
    masked = torch.rand(ids.shape) < rates
    visible = (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)
    logits = model(ids.masked_fill(masked, mask_id), attention_mask=visible, position_ids=positions).logits
    nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view_as(ids)
    return (nats * masked / rates).sum() / ids.numel()


def block_loss(model: torch.nn.Module, ids: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    length = ids.shape[1]
    documents, blocks = (torch.cat([x, x], 1) for x in ((positions == 0).cumsum(1), positions // BLOCK))
    rates = 1e-3 + (1 - 1e-3) * torch.rand(len(ids), 1)
    masked = torch.rand(ids.shape) < rates
    clean = torch.arange(2 * length) >= length
    same_copy = clean[:, None] == clean[None, :]
    own, other = blocks[:, :, None], blocks[:, None, :]
    visible = ((own == other) & same_copy) | ((own > other) & clean[None, :])
    visible = (visible & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    both = torch.cat([ids.masked_fill(masked, mask_id), ids], 1)
    logits = model(both, attention_mask=visible, position_ids=torch.cat([positions, positions], 1)).logits[:, :length]
    nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view_as(ids)
    return (nats * masked / rates).sum() / ids.numel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
