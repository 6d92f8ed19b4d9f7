"""Diffusion language models: their training against the same model's autoregressive training, and decoding.

Training: the rows and the model of the pretrain benchmark. Ours autoregressive, masked and with blocks of 16, and
the straight implementation of the last two (`diffusion_straight.py`), interleaved; ours are compiled.

Decoding: a small masked and a small block model of `patterns.py` continue texts, greedily: LLaDA's plain sampler, a
token a step and whole forwards, against threshold decoding with caches. Quality is the share of tokens that are
right. Then both write with one to many tokens a forward, and fill holes: `diffusion_quality.py`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmtrain.models.saved import load_saved
from llmtrain.recipe.loading import load_recipe
from tests.bench import patterns
from tests.bench.diffusion_quality import accuracy, curve
from tests.bench.diffusion_straight import BLOCK
from tests.bench.harness import compared, interleaved, machine
from tests.bench.pretrain import OURS, RECIPE, write_inputs

STRAIGHT, DECODE = "tests.bench.diffusion_straight", "tests.bench.diffusion_decode"
PRECISIONS = ("fp32", "bf16_autocast")
ALGORITHMS = {
    "ar": "algorithm={kind: causal_lm}",
    "masked": "algorithm={kind: masked_diffusion}",
    "block": f"algorithm={{kind: block_diffusion, block_size: {BLOCK}}}",
}
PROMPT, NEW, BLOCK_LENGTH = 64, 56, 28  # tokens
SAMPLERS = {
    "plain": {"sampler": "llada", "cache": False},
    "threshold": {"sampler": "threshold", "threshold": 0.9, "cache": True},
}
FIGURES = ("tokens_per_second", "peak_memory_bytes")


def bench(quick: bool) -> dict[str, Any]:
    rounds, steps, warmup = (1, 6, 2) if quick else (3, 16, 4)
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, load_recipe(RECIPE), steps)
        for precision in PRECISIONS[:1] if quick else PRECISIONS:
            metrics |= training(work, precision, rounds, steps, warmup, quick)
        decoded, curves = decoding(work, rounds, quick)
    return {
        "bench": "diffusion",
        "peer": "ours autoregressive, and the straight implementation",
        "rounds": rounds,
        "metrics": metrics | decoded,
        "tokens_per_forward_against_quality": curves,
        "machine": machine() | {"torch": torch.__version__},
    }


def training(work: Path, precision: str, rounds: int, steps: int, warmup: int, quick: bool) -> dict[str, Any]:
    """Ratios to our autoregressive training, and to the straight implementation."""
    # Compiled, which all of them are faster with; that takes longer than the whole quick benchmark may.
    contenders = {name: ours(name, precision, not quick, steps, warmup) for name in ALGORITHMS}
    for kind in ("masked", "block"):
        contenders[f"straight_{kind}"] = (STRAIGHT, [str(work), kind, precision, str(warmup)])
    results = interleaved(contenders, rounds)
    metrics = {}
    for figure in FIGURES:
        columns = {name: [result[figure] for result in results[name]] for name in contenders}
        for kind in ("masked", "block"):
            metrics[f"{figure}_{kind}_over_ar_{precision}"] = compared(columns[kind], columns["ar"])
            metrics[f"{figure}_{kind}_over_straight_{precision}"] = compared(columns[kind], columns[f"straight_{kind}"])
    return metrics


def ours(name: str, precision: str, compiled: bool, steps: int, warmup: int) -> tuple[str, list[str]]:
    settings = [f"precision={precision}", f"engine.compile={str(compiled).lower()}", f"steps={steps + 1}"]
    return OURS, [str(RECIPE), str(warmup), ALGORITHMS[name], *settings]


def decoding(work: Path, rounds: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain sampling against threshold decoding with a cache, of a masked and of a block model; and their curves."""
    recipe, steps = patterns.write_recipe(work), 30 if quick else patterns.STEPS
    metrics: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for kind in ("masked", "block"):
        model = train(work, recipe, kind, steps)
        rows = rows_of(model, 4 if quick else 64)
        prompts = work / "prompts.json"
        prompts.write_text(json.dumps([row[:PROMPT] for row in rows]))
        stages = {"block_length": BLOCK_LENGTH if kind == "masked" else None}
        outputs = {name: work / f"{kind}-{name}.json" for name in SAMPLERS}
        contenders = {
            name: (DECODE, [str(model), str(prompts), str(outputs[name]), str(NEW), json.dumps(how | stages)])
            for name, how in SAMPLERS.items()
        }
        results = interleaved(contenders, rounds)
        for figure in ("tokens_per_second", "tokens_per_forward"):
            fast, plain = ([result[figure] for result in results[name]] for name in ("threshold", "plain"))
            metrics[f"decoding_{figure}_{kind}"] = compared(fast, plain)
        fast_right, plain_right = (
            accuracy(rows, slice(PROMPT, PROMPT + NEW), json.loads(outputs[name].read_text()))
            for name in ("threshold", "plain")
        )
        metrics[f"decoding_accuracy_{kind}"] = {"ours": fast_right, "peer": plain_right}
        curves[kind] = curve(model, rows, PROMPT, NEW, BLOCK_LENGTH)
    return metrics, curves


def train(work: Path, recipe: Path, kind: str, steps: int) -> Path:
    """Trains on patterns; with shift, which so small a model learns from much faster."""
    algorithm = ALGORITHMS[kind].replace("}", ", shift: true}")
    settings = [algorithm, f"output_dir={work / 'runs'}", f"name={kind}", f"steps={steps}"]
    command = [sys.executable, "-m", "llmtrain", "train", str(recipe), *settings]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return work / "runs" / kind / "final"


def rows_of(model: Path, num: int) -> list[list[int]]:
    """Texts that it was not trained on."""
    tokenizer = load_saved(str(model)).tokenizer
    return [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in patterns.texts(num, seed=1)
    ]
