"""Our side of the pretrain benchmark: an ordinary run.

usage: python -m tests.bench.pretrain_ours RECIPE WARMUP [key=value ...]
"""

import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from llmtrain import run
from llmtrain.observe.memory import peak_memory_bytes
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe


def main(recipe: str, warmup: int, overrides: list[str]) -> None:
    # A run directory of its own each time, or the run would be found finished.
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        loaded = load_recipe(recipe, [*overrides, f"output_dir={output}"])
        exit_code = run.train(loaded)
        if exit_code != 0:
            sys.exit(exit_code)
        metrics = read_metrics(Path(output) / loaded.recipe.name / "metrics.jsonl")
    records = [record for record in metrics if record["step"] >= warmup]
    # From the end of one step to the end of another: what happens between the steps counts too.
    # The last step is left out, for it has the closing evaluation behind it.
    first, last = records[0], records[-2]
    tokens = last["tokens"] - first["tokens"]
    print(
        json.dumps(
            {
                "tokens_per_second": tokens / (last["time"] - first["time"]),
                "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
                "step_seconds": statistics.median(
                    after["time"] - before["time"] for before, after in itertools.pairwise(records[:-1])
                ),
                "mfu": statistics.median(record["mfu"] for record in records[1:-1]),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
