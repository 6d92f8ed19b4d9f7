"""Real runs for the tests: a tiny recipe on a tiny corpus, in this process or in processes of its own."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from llmtrain import run
from llmtrain.checkpoint.manifest import read_tensors
from llmtrain.checkpoint.storage import state_file
from llmtrain.recipe.loading import load_recipe

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "sequence_length": 32,
    "steps": 6,
    "batch": {"sequences": 8, "micro_sequences": 8},
    "model": {
        "kind": "config",
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    },
    "tokenizer": {"kind": "sentencepiece", "vocab_size": 400},
    "data": {"train": [{"kind": "text", "paths": ["corpus.txt"], "document": "line"}], "validation_fraction": 0.1},
    "algorithm": {"kind": "causal_lm"},
    # With a tiny eps Adam turns the last bits of a gradient near zero into a whole step.
    "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-5},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "engine": {"kind": "auto", "timeout_seconds": 60},
    "evaluation": {"every": 3, "max_sequences": 16},
    "checkpoint": {"every": 3, "keep": 10},
    "logging": {"tensorboard": False},
}
TEXT = "the a quick brown fox jumps over lazy dog and then sleeps under some old tree near our river bank"


def write_recipe(directory: Path, **overrides: Any) -> Path:
    """The tiny recipe and its corpus (documents of ragged lengths) in `directory`; returns its path."""
    chooser, words = random.Random(0), TEXT.split()
    lines = [" ".join(chooser.choices(words, k=chooser.randint(1, 40))) for _ in range(400)]
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(lines) + "\n")
    recipe = RECIPE | {"output_dir": str(directory / "runs")} | overrides
    recipe["data"] = recipe["data"] | {"train": [{"kind": "text", "paths": [str(corpus)], "document": "line"}]}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_here(recipe: Path, *overrides: str) -> Path:
    """Trains in this process to the end; returns the run directory."""
    loaded = load_recipe(recipe, overrides)
    assert run.train(loaded) == 0
    return loaded.recipe.run_directory


def command(recipe: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """`llmtrain train` as a user types it, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "llmtrain", "train", str(recipe), *overrides]


def start(recipe: Path, *overrides: str, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, its output in one pipe; threads shared among the ranks."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return subprocess.Popen(
        command(recipe, *overrides, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | environment,
    )


def train_apart(recipe: Path, *overrides: str, ranks: int = 1) -> Path:
    """Trains in processes of its own to the end; returns the run directory."""
    process = start(recipe, *overrides, ranks=ranks)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    loaded = load_recipe(recipe, overrides)
    return loaded.recipe.run_directory


def cut_after(run: Path, step: int, target: Path) -> None:
    """What a run killed right after the checkpoint of `step` leaves."""
    shutil.copytree(run, target / run.name)
    shutil.rmtree(target / run.name / "final")
    for checkpoint in (target / run.name / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "model.safetensors")


def training_state(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, optimizer and averages of a checkpoint, flattened, whatever layout saved them."""
    path = directory / "checkpoints" / f"step-{step:08d}"
    records = read_tensors(path)
    files = {rank: load_file(path / state_file(rank)) for record in records.values() for rank in record.ranks}
    return {
        name: torch.cat([files[rank][name] for rank in record.ranks])
        for name, record in records.items()
        if not name.startswith("rank-")
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 0, atol: float = 0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
