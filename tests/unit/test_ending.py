"""Two ranks, each in a process of its own, whose run ends: well, by one rank's error, by a hang, by a signal."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import TIMEOUT, seconds_in
from tests.runs import write_recipe

PROGRAM = """
import os, signal, sys, time
from llmtrain import distributed
from llmtrain.cli import _show
from llmtrain.ending import run_to_its_end, watched
from llmtrain.errors import InputError, LLMTrainError, TrainingError
from llmtrain.observe.logs import setup_logging
from llmtrain.recipe.loading import load_recipe
from llmtrain.rundir import claim

recipe = load_recipe(sys.argv[1], sys.argv[3:]).recipe

def wait_for_ever(what="a hang"):
    time.sleep(600)

def action():
    phases, rank = watchdog.phases, world.rank
    ending = sys.argv[2]
    if "start-up" not in ending:
        phases.begin_training(11, 40)
    if ending == "well":
        distributed.barrier()
        return 0
    if rank == 1:
        if ending == "bad input":
            raise InputError("no such file", where="data.train")
        if ending == "both fail":
            time.sleep(1)
            raise TrainingError("it diverged")
        if ending == "unknown error":
            return 1 // 0
        if ending == "killed in the start-up":
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "stopped in the start-up":
            os.kill(os.getpid(), signal.SIGUSR1)
        with phases("data"):
            wait_for_ever()
    if ending == "both fail":
        raise TrainingError("it diverged")
    if "start-up" in ending:
        wait_for_ever()
    with phases("collective"):
        distributed.barrier()

try:
    with distributed.joined("cpu", 120) as world:
        directory = claim(recipe.run_directory, recipe, world)
        setup_logging(directory.logs, world.rank)
        with watched(recipe, directory, world) as watchdog:
            code = run_to_its_end(watchdog, action)
except LLMTrainError as error:
    _show(error)
    code = error.exit_code
sys.exit(code)
"""


def run(directory: Path, ending: str, *overrides: str) -> tuple[int, str, dict[str, Any]]:
    """torchrun's exit code, what is on the screen, and the verdict."""
    recipe = write_recipe(directory)
    (directory / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(directory / "program.py"), str(recipe), ending, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    verdict = json.loads((directory / "runs" / "tiny" / "verdict.json").read_text())
    assert verdict.pop("time")
    return done.returncode, done.stdout, verdict


def log(directory: Path, rank: int) -> str:
    return (directory / "runs" / "tiny" / "logs" / f"rank-{rank}.log").read_text()


HOST = platform.node()


def test_well(tmp_path: Path) -> None:
    code, out, verdict = run(tmp_path, "well")
    assert code == 0, out
    assert verdict == {"verdict": "done", "exit_code": 0, "step": 11, "steps": 40, "message": ""}
    assert "error" not in out and "TCPStore" not in out


@pytest.mark.parametrize(
    ("ending", "exit_code", "message"),
    [
        ("bad input", 2, f"rank 1 on {HOST}: data.train: no such file"),
        ("unknown error", 1, f"rank 1 on {HOST}: ZeroDivisionError: integer division or modulo by zero"),
    ],
)
def test_an_error_of_one_rank_ends_the_others_too(tmp_path: Path, ending: str, exit_code: int, message: str) -> None:
    code, out, verdict = run(tmp_path, ending)
    assert code == 1
    assert (verdict["exit_code"], verdict["message"]) == (exit_code, message), out
    assert f"error: {message}" in out
    # where rank 0 waited; what is wrong with the input no stack shows
    assert ("in barrier" in log(tmp_path, 0)) == (exit_code == 1)


def test_an_error_of_all_ranks_is_the_verdict(tmp_path: Path) -> None:
    _, out, verdict = run(tmp_path, "both fail")
    assert verdict == {"verdict": "failed", "exit_code": 1, "step": 11, "steps": 40, "message": "it diverged"}
    assert "error: it diverged" in out


def test_a_rank_that_hangs_is_named_and_every_stack_is_kept(tmp_path: Path) -> None:
    code, out, verdict = run(tmp_path, "hang", "watchdog.data=2")
    assert code == 1
    assert verdict["verdict"] == "failed"
    assert seconds_in(out, f"error: rank 1 on {HOST} is in data of step 12 for ", " s; watchdog.data is 2") >= 2
    assert f"rank 0, on {HOST}: collective of step 12" in out
    assert "in wait_for_ever" in log(tmp_path, 1) and "in barrier" in log(tmp_path, 0)
    assert "watchdog.data is 2" in log(tmp_path, 1)


def test_a_stop_of_one_rank_in_the_start_up_stops_all(tmp_path: Path) -> None:
    _, out, verdict = run(tmp_path, "stopped in the start-up")
    message = f"rank 1 on {HOST}: stopped by SIGUSR1 before the first step"
    assert verdict == {"verdict": "preempted", "exit_code": 75, "step": 0, "steps": None, "message": message}, out


def test_torchrun_ending_the_rest_in_the_start_up_is_no_preemption(tmp_path: Path) -> None:
    """Rank 1 is killed, say for its memory, and torchrun sends SIGTERM to rank 0: requeueing would go on for ever."""
    _, out, verdict = run(tmp_path, "killed in the start-up")
    assert (verdict["verdict"], verdict["exit_code"]) == ("failed", 1), out
    assert f"error: rank 1 on {HOST} did not answer any more" in out
