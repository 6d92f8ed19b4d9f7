"""One contender of the checkpoint benchmark.

usage: python -m tests.bench.checkpoint_run synchronous|asynchronous SAVES
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.checkpoint.generators import capture_generators
from llmtrain.checkpoint.store import CheckpointStore, Contents
from llmtrain.distributed import World
from llmtrain.engines.replicated import ReplicatedEngine
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import Checkpoint
from tests import tiny

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "tie_word_embeddings": False,
}
STEPS_BETWEEN = 16  # optimizer steps from one save to the next: more than one save takes, as in a run


def main(how: str, saves: int) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    world = World(0, 1, 0, 1, torch.device("cpu"))
    engine = ReplicatedEngine(Blueprint(Decoder(model)), tiny.recipe(), world)
    ids = torch.randint(SHAPE["vocab_size"], (1, 16))
    stalls, steps = [], []
    with tempfile.TemporaryDirectory() as name:
        store = CheckpointStore(Path(name), Checkpoint(keep=1, asynchronous=how == "asynchronous"), world)
        started = time.perf_counter()
        for number in range(1, saves + 1):
            for _ in range(STEPS_BETWEEN):
                begun = time.perf_counter()
                with engine.accumulate(True):
                    engine.backward(
                        engine.model(ids, None, lambda hidden, head: head(hidden).float().logsumexp(-1).sum())
                    )
                engine.step(1e-6)
                steps.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            store.save(number, engine.state(), Contents(capture_generators(), {}, {}, engine.describe()))
            stalls.append(time.perf_counter() - begun)
        store.wait()
        total = time.perf_counter() - started
        newest = store.newest()
        assert newest is not None
        written = sum(path.stat().st_size for path in newest.iterdir())
    state_bytes = sum(shard.local.nbytes for shard in engine.state().values())
    print(
        json.dumps(
            {
                # The first save also makes the copies' memory: what it costs stands beside.
                "stall_seconds": statistics.mean(stalls[1:] or stalls),
                "first_stall_seconds": stalls[0],
                "seconds_per_save": total / saves,
                "step_seconds": statistics.mean(steps),
                "bytes_written": written,
                "state_bytes": state_bytes,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
