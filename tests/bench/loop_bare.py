"""The bare loop of the loop benchmark: what one would write by hand for this one model on one device.

usage: python -m tests.bench.loop_bare WORK WARMUP
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy
from tests.bench.pretrain import ROWS_PER_STEP


def main(work: Path, warmup: int) -> None:
    with np.load(work / "rows.npz") as rows:
        ids = torch.from_numpy(rows["input_ids"]).view(-1, ROWS_PER_STEP, rows["input_ids"].shape[1])
        positions = torch.from_numpy(rows["position_ids"]).view_as(ids)
        targets = torch.from_numpy(rows["targets"]).view_as(ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / "model"))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    ends = []
    for step in range(len(ids)):
        hidden = model.model(input_ids=ids[step], position_ids=positions[step], use_cache=False).last_hidden_state
        flat = targets[step].flatten()
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, flat) / (flat != IGNORE_INDEX).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.time())
    seconds = np.diff(ends)[warmup:]
    print(json.dumps({"step_seconds": statistics.median(seconds), "steps": len(seconds)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
