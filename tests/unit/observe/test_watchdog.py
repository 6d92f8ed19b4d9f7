"""The watchdog of a single process; that of several ranks is in tests/unit/test_ending.py and tests/faults."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llmtrain.observe.heartbeat import Word
from llmtrain.observe.watchdog import Watchdog
from llmtrain.signals import StopRequest
from tests.ranks import TIMEOUT, seconds_in
from tests.tiny import ALONE

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch
from llmtrain.distributed import World
from llmtrain.observe.logs import setup_logging
from llmtrain.observe.watchdog import Watchdog
from llmtrain.signals import StopRequest

def a_source_that_hangs():
    print("hanging", flush=True)
    time.sleep(600)

logs = Path(sys.argv[1])
setup_logging(logs, 0)
stop = StopRequest()
def on_end(word):
    print(word.code, word.kind, word.message.splitlines()[0], flush=True)
with stop.listening(), Watchdog(
    {"data": 2}, 60, World(0, 1, 0, 1, torch.device("cpu")), logs / "rank-0.log", stop, on_end
) as watchdog:
"""


def begun(directory: Path, code: str) -> subprocess.Popen[str]:
    indented = textwrap.indent(textwrap.dedent(code), "    ")
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + indented, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def watchdog(directory: Path, ends: list[Word]) -> Watchdog:
    return Watchdog({"data": 1000}, 1000, ALONE, directory / "rank-0.log", StopRequest(), ends.append)


def test_a_run_that_ends_by_itself_leaves_no_threads(tmp_path: Path) -> None:
    before, ends = set(threading.enumerate()), list[Word]()
    with watchdog(tmp_path, ends) as dog:
        with dog.phases("data"):
            pass
        assert dog.last_word(Word(0)) == Word(0)
    assert ends == [Word(0)]
    assert set(threading.enumerate()) <= before  # one of another test's may have ended meanwhile


def test_a_run_that_fails_leaves_no_threads(tmp_path: Path) -> None:
    before, ends = set(threading.enumerate()), list[Word]()
    with pytest.raises(ZeroDivisionError), watchdog(tmp_path, ends):
        raise ZeroDivisionError
    assert set(threading.enumerate()) <= before and ends == []


def test_sigusr2_writes_the_stacks_and_the_process_goes_on(tmp_path: Path) -> None:
    with watchdog(tmp_path, []):
        os.kill(os.getpid(), signal.SIGUSR2)
        text = (tmp_path / "rank-0.log").read_text()
    assert "test_sigusr2_writes_the_stacks" in text and "in _watch" in text


def test_a_phase_beyond_its_deadline_ends_the_process(tmp_path: Path) -> None:
    code = """
    watchdog.phases.begin_training(11, 40)
    with watchdog.phases("data"):
        a_source_that_hangs()
    """
    process = begun(tmp_path, code)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert out.startswith("hanging\n1 overdue rank 0 on ")
    assert seconds_in(out, "is in data of step 12 for ", " s; watchdog.data is 2") >= 2
    assert "watchdog.data is 2" in err and "remedy: the same command goes on from the last checkpoint" in err
    log = (tmp_path / "rank-0.log").read_text()
    assert "data of step 12; all threads:" in log and "in a_source_that_hangs" in log


def test_a_phase_without_a_deadline_may_last(tmp_path: Path) -> None:
    code = """
    with watchdog.phases("collective"):
        time.sleep(4)
    """
    process = begun(tmp_path, code)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (0, ""), err


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    """As when Slurm suspends a job, or a lid is closed."""
    code = """
    with watchdog.phases("data"):
        print("begun", flush=True)
        while not Path(sys.argv[1], "enough").exists():
            time.sleep(0.01)
    """
    process = begun(tmp_path, code)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    (tmp_path / "enough").touch()
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (0, ""), err


def test_a_stop_in_the_start_up_ends_the_process_at_once(tmp_path: Path) -> None:
    process = begun(tmp_path, "a_source_that_hangs()")
    assert process.stdout is not None and process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75
    assert out == "75 ended stopped by SIGTERM before the first step\n"
    assert err == "warning: stopped by SIGTERM before the first step\n"
    assert "all threads" not in (tmp_path / "rank-0.log").read_text()


def test_a_stop_after_the_start_up_is_the_loops(tmp_path: Path) -> None:
    code = """
    watchdog.phases.begin_training(0, 40)
    print("begun", flush=True)
    while not stop:
        time.sleep(0.01)
    time.sleep(2)
    print(watchdog.why_stopped())
    """
    process = begun(tmp_path, code)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (0, "stopped by SIGUSR1\n"), err
