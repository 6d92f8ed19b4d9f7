"""Pretraining a 12M-parameter Llama: ours against TRL's SFTTrainer on the same packed rows.

Rows hold 256 tokens of the Python standard library, several documents each, attention isolated;
8 rows a step, AdamW, clipping. Tokens are counted between the ends of optimizer steps, after
warm-up. Each side runs at its best settings, found by trying them first: ours compiled or not;
TRL padding-free with its 8 rows as 8 x 1, 4 x 2, 2 x 4 or 1 x 8 (batch x accumulation), the
best of them compiled too. Memory is the whole process's peak.
"""

import importlib.util
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.recipe.loading import LoadedRecipe, load_recipe
from tests.bench.harness import PeerMissing, compared, interleaved, machine, run_contender

RECIPE = Path(__file__).with_name("pretrain.yaml")
ROWS_PER_STEP = 8
OURS = "tests.bench.pretrain_ours"
PEER = "tests.bench.pretrain_trl"
PRECISIONS = ("fp32", "bf16_autocast")


def bench(quick: bool) -> dict[str, Any]:
    if importlib.util.find_spec("trl") is None:
        raise PeerMissing("trl is not installed: pip install -e '.[test]'")
    rounds, steps, warmup = (1, 6, 2) if quick else (5, 16, 4)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, load_recipe(RECIPE), steps)
        metrics: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for precision in PRECISIONS:
            best = best_settings(work, precision, quick)
            contenders = {
                "ours": ours(precision, best["ours"], steps, warmup),
                "peer": peer(work, precision, best["peer"], steps, warmup),
            }
            results = interleaved(contenders, rounds)
            for figure in ("tokens_per_second", "peak_memory_bytes"):
                columns = {name: [result[figure] for result in results[name]] for name in contenders}
                metrics[f"{figure}_{precision}"] = compared(columns["ours"], columns["peer"])
            shares = sorted(result["mfu"] for result in results["ours"])
            metrics[f"mfu_{precision}"] = {"ours": shares[len(shares) // 2], "limit": 1.0}
            settings[precision] = best
    return {
        "bench": "pretrain",
        "peer": f"trl {metadata.version('trl')} SFTTrainer, packing",
        "rounds": rounds,
        "settings": settings,
        "metrics": metrics,
        "machine": machine() | {"torch": torch.__version__},
    }


def ours(precision: str, compiled: bool, steps: int, warmup: int) -> tuple[str, list[str]]:
    settings = [f"precision={precision}", f"engine.compile={str(compiled).lower()}", f"steps={steps + 1}"]
    return OURS, [str(RECIPE), str(warmup), *settings]


def peer(work: Path, precision: str, settings: tuple[int, int, bool], steps: int, warmup: int) -> tuple[str, list[str]]:
    return PEER, [str(work), precision, str(steps), str(warmup), *(str(int(value)) for value in settings)]


def best_settings(work: Path, precision: str, quick: bool) -> dict[str, Any]:
    """The fastest settings of each side; without a search in a quick run."""
    if quick:
        return {"ours": False, "peer": (1, 8, False)}
    steps, warmup = 7, 3

    def speed_of_ours(compiled: bool) -> float:
        return run_contender(*ours(precision, compiled, steps, warmup))["tokens_per_second"]

    def speed_of_peer(setting: tuple[int, int, bool]) -> float:
        return run_contender(*peer(work, precision, setting, steps, warmup))["tokens_per_second"]

    eager = {setting: speed_of_peer(setting) for batch in (1, 2, 4, 8) if (setting := (batch, 8 // batch, False))}
    batch, accumulation, _ = max(eager, key=lambda setting: eager[setting])
    compiled = (batch, accumulation, True)
    theirs = eager | {compiled: speed_of_peer(compiled)}
    mine = {compiled: speed_of_ours(compiled) for compiled in (False, True)}
    print(f"{precision}: peer {theirs}, ours {mine}", file=sys.stderr, flush=True)
    return {
        "ours": max(mine, key=lambda setting: mine[setting]),
        "peer": max(theirs, key=lambda setting: theirs[setting]),
    }


def write_inputs(work: Path, loaded: LoadedRecipe, steps: int) -> None:
    """Model config, tokenizer and the very rows of our first steps, for the peer to read."""
    from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
    from llmtrain.data.loader import Loader
    from llmtrain.models.hub import open_model

    recipe = loaded.recipe
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache)
    open_model(recipe, tokenizer).decoder.hf.config.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    loader = Loader(datasets.train, datasets.order(recipe.seed), ROWS_PER_STEP, ROWS_PER_STEP, rank=0, world_size=1)
    batches = [loader.micro_batches(step)[0].tensors for step in range(steps)]
    ids = torch.cat([batch["input_ids"] for batch in batches]).numpy()
    positions = torch.cat([batch["position_ids"] for batch in batches]).numpy()
    lengths = np.zeros_like(ids)
    for row, position in enumerate(positions):
        starts = np.flatnonzero(position == 0)
        segments = np.diff([*starts, len(position)])
        lengths[row, : len(segments)] = segments
    targets = torch.cat([batch["targets"] for batch in batches]).numpy()
    np.savez(work / "rows.npz", input_ids=ids, segment_lengths=lengths, position_ids=positions, targets=targets)
