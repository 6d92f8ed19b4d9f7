"""What the reward and the dpo benchmark share: ours against TRL's trainer on the same pairs.

The pairs are those of `preference_data.py`, the model is SmolLM2-135M's shape, the sft benchmark's. Both sides
train on the same 8 pairs in each optimizer step, in fp32 and bf16 autocast; counted are the pairs trained on
between the ends of the first step and of the last. Ours computes a prompt once for both answers, each pair a row
of its own. TRL computes it with each, and pads: DPOTrainer's padding_free is disabled in 1.16, RewardTrainer has
none; the pairs of a step come to it sorted by length. Each side runs with 1, 2 or 4 pairs in a micro-batch,
whichever is fastest for it when tried first. Neither is compiled.

Log-probabilities under the reference are computed before the first step on both sides, and so in neither's time;
in both's memory, which is the whole process's peak. A difference that is the CPU's: TRL's DPOTrainer computes the
head of all positions there, of the answers' only on GPUs with Triton.
"""

import importlib.util
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.bench.harness import PeerMissing, compared, interleaved, machine, run_contender
from tests.bench.preference_data import PAIRS_PER_STEP, WRITTEN, write_inputs
from tests.bench.sft import SMOLLM2

OURS, PEER = "tests.bench.preference_ours", "tests.bench.preference_trl"
TRAINERS = {"reward": "RewardTrainer", "dpo": "DPOTrainer"}
BATCHES = (1, 2, 4)  # pairs in a micro-batch
PRECISIONS = ("fp32", "bf16_autocast")
SAME = ("first_loss", "pairs_per_step", "tokens_per_pair")  # what shows that both do the same work
FIGURES = ("pairs_per_second", "peak_memory_bytes")
# So that a quick run ends within a minute: few layers, and no more of a vocabulary than the tokenizer has.
SMALL = SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 8192}


def bench(kind: str, quick: bool) -> dict[str, Any]:
    """`kind`: reward or dpo."""
    if importlib.util.find_spec("trl") is None:
        raise PeerMissing("trl is not installed: pip install -e '.[test]'")
    rounds, steps, warmup = (1, 2, 1) if quick else (3, 6, 1)
    metrics: dict[str, Any] = {}
    same_work: dict[str, Any] = {}
    settings: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, kind, PAIRS_PER_STEP * steps, SMALL if quick else SMOLLM2)
        for precision in PRECISIONS[-1:] if quick else PRECISIONS:
            best = {side: BATCHES[0] if quick else best_batch(work, kind, side, precision) for side in ("ours", "peer")}
            contenders = {
                side: contender(work, kind, side, precision, batch, steps, warmup) for side, batch in best.items()
            }
            results = interleaved(contenders, rounds)
            for figure in FIGURES:
                columns = {name: [result[figure] for result in results[name]] for name in contenders}
                metrics[f"{figure}_{precision}"] = compared(columns["ours"], columns["peer"])
            for figure in SAME:
                same_work[f"{figure}_{precision}"] = {name: results[name][0][figure] for name in contenders}
            settings[precision] = best
    return {
        "bench": kind,
        "peer": f"trl {metadata.version('trl')} {TRAINERS[kind]}",
        "rounds": rounds,
        "pairs_of_a_micro_batch": settings,
        "metrics": metrics,
        "same_work": same_work,
        "machine": machine() | {"torch": torch.__version__},
    }


def contender(
    work: Path, kind: str, side: str, precision: str, batch: int, steps: int, warmup: int
) -> tuple[str, list[str]]:
    """`batch`: pairs in a micro-batch."""
    if side == "ours":
        settings = [f"precision={precision}", f"batch.micro_sequences={batch}", f"steps={steps}"]
        return OURS, [str(work / WRITTEN), str(warmup), *settings]
    numbers = (steps, warmup, batch, PAIRS_PER_STEP // batch)
    return PEER, [str(work), kind, precision, *map(str, numbers)]


def best_batch(work: Path, kind: str, side: str, precision: str) -> int:
    """The fastest number of pairs in a micro-batch."""
    speeds = {
        batch: run_contender(*contender(work, kind, side, precision, batch, 2, 1))["pairs_per_second"]
        for batch in BATCHES
    }
    print(f"{kind} {precision}: {side}, by pairs in a micro-batch: {speeds}", file=sys.stderr, flush=True)
    return max(speeds, key=lambda batch: speeds[batch])
