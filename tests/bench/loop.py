"""One optimizer step of ours against a bare PyTorch loop: the same model, rows, loss and optimizer.

What is compared is all that our loop, engine, data order and figures add. fp32, one process, not
compiled; the time from the end of one step to the end of another, after warm-up.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from llmtrain.recipe.loading import load_recipe
from tests.bench.harness import compared, interleaved, machine
from tests.bench.pretrain import RECIPE, write_inputs

OURS = "tests.bench.pretrain_ours"
PEER = "tests.bench.loop_bare"


def bench(quick: bool) -> dict[str, Any]:
    rounds, steps, warmup = (1, 6, 2) if quick else (7, 24, 4)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, load_recipe(RECIPE), steps)
        contenders = {
            "ours": (OURS, [str(RECIPE), str(warmup), f"steps={steps + 1}", "logging.tensorboard=false"]),
            "peer": (PEER, [str(work), str(warmup)]),
        }
        results = interleaved(contenders, rounds)
    seconds = {name: [result["step_seconds"] for result in results[name]] for name in contenders}
    return {
        "bench": "loop",
        "peer": f"bare PyTorch loop, torch {torch.__version__}",
        "rounds": rounds,
        "metrics": {"step_seconds": compared(seconds["ours"], seconds["peer"])},
        "machine": machine() | {"torch": torch.__version__},
    }
