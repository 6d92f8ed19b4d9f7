"""Runs of two ranks of which one is stopped or killed: the other says so, and the job ends."""

import os
import platform
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ranks import TIMEOUT, ranks_of, seconds_in, wait_for_text, wait_until_trained
from tests.runs import start, write_recipe

HOST = platform.node()
SETTINGS = {
    "steps": 100_000,
    "batch": {"sequences": 8, "micro_sequences": 4},
    "evaluation": {"every": 1_000_000, "max_sequences": 16},
    "checkpoint": {"every": 1_000_000, "keep": 2},
}


class Training:
    """Two ranks that train, in the temporary directory of a test."""

    def __init__(self, directory: Path, *overrides: str):
        recipe = write_recipe(directory, **SETTINGS)
        self.run = directory / "runs" / "tiny"
        self.process = start(recipe, *overrides, ranks=2)
        wait_until_trained(self.run / "metrics.jsonl", self.process)
        self.ranks = ranks_of(self.process.pid)
        assert set(self.ranks) == {0, 1}

    def log(self, rank: int) -> Path:
        return self.run / "logs" / f"rank-{rank}.log"

    def output(self) -> str:
        output, _ = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode != 0
        return output


@contextmanager
def training(directory: Path, *overrides: str) -> Iterator[Training]:
    run = Training(directory, *overrides)
    try:
        yield run
    finally:
        for pid in run.ranks.values():  # those that a failed test has left
            subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
        run.process.kill()
        run.process.communicate()


def test_a_stopped_rank_is_named_and_the_stacks_are_kept(tmp_path: Path) -> None:
    with training(tmp_path, "watchdog.silence=3") as run:
        os.kill(run.ranks[1], signal.SIGSTOP)
        wait_for_text(run.log(0), f"rank 1 on {HOST} said nothing for ", run.process)
        os.kill(run.ranks[1], signal.SIGKILL)  # torchrun would wait 30 s before it does
        output = run.output()
    assert seconds_in(output, f"error: rank 1 on {HOST} said nothing for ", " s; last: ") >= 3
    assert f"  rank 1, on {HOST}: " in output and seconds_in(output, ", silent for ", " s") >= 3
    assert f"  rank 0, on {HOST}: " in output
    log = run.log(0).read_text()
    assert "all threads:" in log and "in _step" in log  # the main thread, in a collective


@pytest.mark.slow
def test_rank_0_stopped(tmp_path: Path) -> None:
    """Then its store does not answer either, and another rank speaks."""
    with training(tmp_path, "watchdog.silence=3") as run:
        os.kill(run.ranks[0], signal.SIGSTOP)
        wait_for_text(run.log(1), f"rank 0 on {HOST} said nothing for ", run.process)
        os.kill(run.ranks[0], signal.SIGKILL)
        output = run.output()
    assert seconds_in(output, f"[rank 1] error: rank 0 on {HOST} said nothing for ", " s; last: ") >= 3
    assert "in _step" in run.log(1).read_text()


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        os.kill(run.ranks[1], signal.SIGKILL)
        output = run.output()
    assert f"error: rank 1 on {HOST} did not answer any more (killed, crashed or stopped); last: " in output
    assert "remedy: the same command goes on from the last checkpoint" in output
    assert "please report the traceback" not in output


@pytest.mark.slow
def test_rank_0_killed(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        os.kill(run.ranks[0], signal.SIGKILL)
        output = run.output()
    assert f"[rank 1] error: rank 0 on {HOST} " in output
    assert "please report the traceback" not in output


def test_a_rank_can_be_asked_where_it_is(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        os.kill(run.ranks[1], signal.SIGUSR2)
        wait_for_text(run.log(1), "most recent call first", run.process)
        num_lines = len((run.run / "metrics.jsonl").read_text().splitlines())
        wait_until_trained(run.run / "metrics.jsonl", run.process, num_lines + 5)  # and it goes on
        os.kill(run.process.pid, signal.SIGTERM)
        run.output()
