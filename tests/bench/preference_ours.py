"""Our side of the preference benchmarks: an ordinary run, and the pairs of its steps counted.

usage: python -m tests.bench.preference_ours RECIPE WARMUP [key=value ...]
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from llmtrain import run
from llmtrain.contracts import POLICY
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.group_batches import GroupCollator
from llmtrain.data.loader import Loader
from llmtrain.data.prepared import group_layout
from llmtrain.data.tokenizer import pad_id
from llmtrain.observe.memory import peak_memory_bytes
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import Recipe


def main(path: str, warmup: int, overrides: list[str]) -> None:
    # A run directory of its own each time, or the run would be found finished.
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        recipe = (loaded := load_recipe(path, [*overrides, f"output_dir={output}"])).recipe
        exit_code = run.train(loaded)
        if exit_code != 0:
            sys.exit(exit_code)
        memory = peak_memory_bytes(torch.device("cpu"))
        records = {int(record["step"]): record for record in read_metrics(Path(output) / recipe.name / "metrics.jsonl")}
        steps = recipe.steps
        assert steps is not None, "the recipe says how many"
        counts = counted(recipe, steps)
    # From the end of one step to the end of another: what happens between the steps counts too.
    timed = range(warmup, steps)
    pairs = sum(counts[step][0] for step in timed)
    figures = {
        "pairs_per_second": pairs / (records[steps]["time"] - records[warmup]["time"]),
        "peak_memory_bytes": memory,
        "first_loss": records[1]["loss"],
        "pairs_per_step": pairs / len(timed),
        "tokens_per_pair": sum(counts[step][1] for step in timed) / pairs,
    }
    print(json.dumps(figures))


def counted(recipe: Recipe, steps: int) -> list[tuple[float, int]]:
    """For each optimizer step its pairs, and the tokens of their answers, each with its prompt."""
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache)
    collator = GroupCollator(group_layout(recipe), recipe.sequence_length, pad_id(tokenizer))
    sequences = recipe.batch.sequences
    assert sequences is not None, "the recipe says how many"
    loader = Loader(datasets.train, datasets.order(recipe.seed), sequences, 1, 0, 1, collator)
    counts = []
    for step in range(steps):
        batch = [(micro.weights[POLICY], micro.tensors) for micro in loader.micro_batches(step)]
        # An answer's last token stands at a position as high as there are tokens before it, shared prompt or not.
        tokens = sum(int((of["position_ids"].flatten()[of["ends"]] + 1).sum()) for _, of in batch)
        counts.append((sum(pairs for pairs, _ in batch), tokens))
    return counts


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
