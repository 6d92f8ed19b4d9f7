"""Counts what one optimizer step sends on one engine.

usage: torchrun --nproc-per-node N -m tests.bench.communication_run ENGINE MICRO_BATCHES
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain import distributed, engines
from llmtrain.contracts import mark_last
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.loss_head import linear_cross_entropy
from tests import tiny

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-keep": {"kind": "fsdp", "reshard_after_forward": False},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}
# By default DeepSpeed keeps up to 1e9 gathered weights from the forward to the backward: all of so small a model.
ZERO3_FREES_AT_ONCE = {
    "zero_optimization": {
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}

# What each collective moves, in sizes of the tensor that is named; an all-reduce is a reduce-scatter and an all-gather.
VOLUMES = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "_allgather_base_": (0, 1),
    "allgather_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "reduce_": (0, 1),
    "broadcast_": (0, 1),
    "alltoall_base_": (1, 1),
    "barrier": (None, 0),
}


def num_bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(num_bytes(tensor) for tensor in tensors)


class CountBytes(TorchDispatchMode):
    """Every collective of this rank goes through the dispatcher, DDP's from C++ too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.collectives = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            argument, volume = VOLUMES[name]
            if argument is not None:
                self.bytes += volume * num_bytes(args[argument])
                self.collectives[name] += 1
        return func(*args, **(kwargs or {}))


def main(engine_name: str, num_micro_batches: int) -> None:
    engine_options = dict(ENGINES[engine_name])
    if engine_name == "zero3":
        file = Path(tempfile.mkdtemp()) / "deepspeed.json"
        file.write_text(json.dumps(ZERO3_FREES_AT_ONCE))
        engine_options["config"] = str(file)
    recipe = tiny.recipe(engine=engine_options, batch={"sequences": 8})
    with distributed.joined("cpu", 60) as world:
        decoder = tiny.decoder(**SHAPE, tie_word_embeddings=False)
        parameter_bytes = sum(parameter.nbytes for parameter in decoder.parameters())
        layer_bytes = sum(parameter.nbytes for layer in decoder.layers() for parameter in layer.parameters())
        engine = engines.prepare(Blueprint(decoder), recipe, world)
        ids = torch.arange(16).unsqueeze(0)

        def step() -> None:
            for _, last in mark_last([None] * num_micro_batches):
                with engine.accumulate(last):
                    engine.backward(
                        engine.model(ids, None, lambda h, head: linear_cross_entropy(h[0], head.weight, ids[0]))
                    )
            engine.step(1e-3)

        for _ in range(3):  # DDP arranges its buckets and DeepSpeed records the order of modules in the first ones
            step()
        with CountBytes() as counted:
            step()
        if world.is_main:
            result = {
                "bytes": counted.bytes,
                "parameter_bytes": parameter_bytes,
                "rest_bytes": parameter_bytes - layer_bytes,
                "collectives": counted.collectives,
            }
            print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
