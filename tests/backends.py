"""What a run trained on one backend, compared with what it trained on another."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.observe.metrics import read_metrics

ENGINES = {
    "ddp": "engine.kind=ddp",
    "fsdp": "engine.kind=fsdp",
    "zero1": "engine={kind: deepspeed, zero_stage: 1}",
    "zero2": "engine={kind: deepspeed, zero_stage: 2}",
    "zero3": "engine={kind: deepspeed, zero_stage: 3}",
}
if importlib.util.find_spec("deepspeed") is None:  # pip install -e '.[deepspeed]' brings it
    ENGINES = {name: setting for name, setting in ENGINES.items() if not name.startswith("zero")}

# Times and memory differ from run to run.
UNEQUAL = {"time", "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}


def slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


def compare(run: Path, reference: Path, figures: tuple[str, ...] | None = None, least: float = 1e-7) -> None:
    """Asserts that two runs trained the same weights, and saw the same figures: all, or those named.

    `least` is how far figures may be apart whatever their size: what is a difference of large ones keeps their error.
    """
    for file in ("model.safetensors", "adapter_model.safetensors"):
        if not (reference / "final" / file).exists():
            continue
        ours, theirs = load_file(run / "final" / file), load_file(reference / "final" / file)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            torch.testing.assert_close(
                ours[name], weight, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    records = zip(read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl"), strict=True)
    for mine, expected in records:
        for figure in figures or expected.keys() - UNEQUAL:
            if figure in expected:
                assert mine[figure] == pytest.approx(expected[figure], rel=1e-5, abs=least), figure
