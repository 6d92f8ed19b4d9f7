"""What the benchmarks share: contenders in processes of their own, interleaved, on the same threads."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class PeerMissing(Exception):
    """The peer is not installed, so there is nothing to compare with."""


def run_contender(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs `python -m module arguments` and returns the JSON of its last line.

    Threads are pinned to the cores this process may use, for every contender alike.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    threads = str(len(os.sched_getaffinity(0)))
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdout=output, stderr=errors, env=environment
        )
        process.wait()
        output.seek(0)
        lines = output.read().splitlines()
        if process.returncode != 0:
            errors.seek(0)
            tail = "\n".join([*lines, *errors.read().splitlines()][-20:])
            raise RuntimeError(f"{module} {' '.join(arguments)} exited with {process.returncode}:\n{tail}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def interleaved(contenders: Mapping[str, tuple[str, Sequence[str]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each contender once a round, in turn; the order turns around every round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(run_contender(*contenders[name]))
            print(f"round {number + 1} of {rounds}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def compared(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Medians of both, and the median of the rounds' own ratios, ours over peer."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": round(statistics.median(ratios), 3),
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
