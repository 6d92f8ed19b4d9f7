"""How long training stands still for a checkpoint of a 100M-parameter model: asynchronous against synchronous.

Each save comes between two optimizer steps, as in a run. What stands still is the time of the call;
an asynchronous save may slow the steps behind it, so their time is reported beside it.
"""

from typing import Any

import torch

from tests.bench.harness import compared, interleaved, machine

CONTENDER = "tests.bench.checkpoint_run"


def bench(quick: bool) -> dict[str, Any]:
    rounds, saves = (1, 2) if quick else (3, 4)
    contenders = {
        "ours": (CONTENDER, ["asynchronous", str(saves)]),
        "peer": (CONTENDER, ["synchronous", str(saves)]),
    }
    results = interleaved(contenders, rounds)
    columns = {
        figure: {name: [result[figure] for result in results[name]] for name in contenders}
        for figure in ("stall_seconds", "first_stall_seconds", "step_seconds", "seconds_per_save")
    }
    written, state = results["peer"][0]["bytes_written"], results["peer"][0]["state_bytes"]
    return {
        "bench": "checkpoint",
        "peer": "ours, synchronous",
        "rounds": rounds,
        "metrics": {figure: compared(column["ours"], column["peer"]) for figure, column in columns.items()}
        | {"bytes_written": {"ours": written, "limit": state, "ratio": round(written / state, 5)}},
        "machine": machine() | {"torch": torch.__version__},
    }
