"""What the reward and the dpo benchmark share: ours against TRL's trainer on the same pairs.

The pairs are those of `preference_data.py`, the model is SmolLM2-135M's shape, the sft benchmark's. Both sides
train on the same 8 pairs in each optimizer step, in fp32 and bf16 autocast; counted are the pairs trained on
between the ends of the first step and of the last. Ours computes a prompt once for both answers, each pair a row
of its own. TRL computes it with each, and pads: DPOTrainer's padding_free is disabled in 1.16, RewardTrainer has
none; the pairs of a step come to it sorted by length. Each side runs with 1, 2 or 4 pairs in a micro-batch: the
fewest that are as fast as the fastest within `NOISE` when tried first, since more only take memory. What all of
them take is in the result. Neither side is compiled.

Log-probabilities under the reference are computed before the first step on both sides, and so in neither's time;
in both's memory, which is the whole process's peak. A difference that is the CPU's: TRL's DPOTrainer computes the
head of all positions there, of the answers' only on GPUs with Triton.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
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
NOISE = 0.03  # of the speed of two steps
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
    tried: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, kind, PAIRS_PER_STEP * steps, SMALL if quick else SMOLLM2)
        for precision in PRECISIONS[-1:] if quick else PRECISIONS:
            batches = BATCHES[:1] if quick else BATCHES
            tried[precision] = {side: tries(work, kind, side, precision, batches) for side in ("ours", "peer")}
            settings[precision] = {side: best_batch(tried[precision][side]) for side in ("ours", "peer")}
            contenders = {
                side: contender(work, kind, side, precision, batch, steps, warmup)
                for side, batch in settings[precision].items()
            }
            results = interleaved(contenders, rounds)
            for figure in FIGURES:
                columns = {name: [result[figure] for result in results[name]] for name in contenders}
                metrics[f"{figure}_{precision}"] = compared(columns["ours"], columns["peer"])
            for figure in SAME:
                same_work[f"{figure}_{precision}"] = {name: results[name][0][figure] for name in contenders}
    return {
        "bench": kind,
        "peer": f"trl {metadata.version('trl')} {TRAINERS[kind]}",
        "rounds": rounds,
        "pairs_of_a_micro_batch": settings,
        "tried": tried,
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


def tries(work: Path, kind: str, side: str, precision: str, batches: Sequence[int]) -> dict[int, dict[str, float]]:
    """The figures of a short run with each number of pairs in a micro-batch."""
    found = {}
    for batch in batches:
        result = run_contender(*contender(work, kind, side, precision, batch, 2, 1))
        found[batch] = {figure: result[figure] for figure in FIGURES}
    print(f"{kind} {precision}: {side}, by pairs in a micro-batch: {found}", file=sys.stderr, flush=True)
    return found


def best_batch(found: dict[int, dict[str, float]]) -> int:
    """The fewest pairs in a micro-batch that are as fast as the fastest."""
    fastest = max(figures["pairs_per_second"] for figures in found.values())
    return min(batch for batch, figures in found.items() if figures["pairs_per_second"] >= (1 - NOISE) * fastest)
