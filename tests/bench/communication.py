"""Bytes that cross the network in one optimizer step on two ranks, for each engine, against theory.

Theory (ZeRO, arXiv 1910.02054; FSDP, arXiv 2304.11277), in volumes of the model's P parameters: an
all-reduce moves 2P (a reduce-scatter and an all-gather), ddp and ZeRO-1 and 2 move 2P, FSDP and
ZeRO-3 move 3P (weights gathered for the forward and again for the backward, gradients scattered).
With k micro-batches ddp and ZeRO-1 still need 2P and FSDP 2kP + P: gradients are reduced once. ZeRO-2
and 3 keep only their part of a gradient, and reduce in each. FSDP's last unit (embeddings, norm,
head: R of the P) is computed with last in the forward and first in the backward, and is gathered once.
"""

from typing import Any

import torch

from tests.bench.harness import machine, run_contender

ACCUMULATION = 4
RANKS = 2
K = ACCUMULATION
# Volumes of P and of R for one micro-batch, and for K of them.
THEORY = {
    "ddp": ((2, 0), (2, 0)),
    "fsdp": ((3, -1), (2 * K + 1, -K)),
    "fsdp-keep": ((2, 0), (K + 1, 0)),
    "zero1": ((2, 0), (2, 0)),
    "zero2": ((2, 0), (K + 1, 0)),
    "zero3": ((3, 0), (3 * K, 0)),
}


def bench(quick: bool) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for engine, volumes in THEORY.items():
        for micro_batches, (of_all, of_rest) in zip((1, ACCUMULATION), volumes, strict=True):
            launcher = ["--standalone", f"--nproc-per-node={RANKS}", "-m", "tests.bench.communication_run"]
            result = run_contender("torch.distributed.run", [*launcher, engine, str(micro_batches)])
            limit = of_all * result["parameter_bytes"] + of_rest * result["rest_bytes"]
            metrics[f"bytes_per_step_{engine}_accumulation_{micro_batches}"] = {
                "ours": result["bytes"],
                "limit": limit,
                "ratio": round(result["bytes"] / limit, 4),
                "parameter_volumes": round(result["bytes"] / result["parameter_bytes"], 4),
                "collectives": result["collectives"],
            }
    return {
        "bench": "communication",
        "peer": "theory, in parameter volumes",
        "rounds": 1,
        "metrics": metrics,
        "machine": machine() | {"torch": torch.__version__},
    }
