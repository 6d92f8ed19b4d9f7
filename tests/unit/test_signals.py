"""Real signals, sent to real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llmtrain import signals
from llmtrain.signals import SIGNALS, StopRequest
from tests.ranks import TIMEOUT

# Imports nothing but the module and what it needs, so that it starts at once.
STUBBORN = """
import ctypes, os, signal, sys, time
from llmtrain import signals
signals.ECHO_SECONDS = float(sys.argv[1])
numbers = [int(number) for number in sys.argv[3:]]
stop = signals.StopRequest()
with stop.listening():
    for number in numbers[:-1]:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    print("asked by", stop.signal.name, flush=True)
    if sys.argv[2] == "stuck":
        # In C, without the interpreter's lock and deaf to signals, as a collective is: a mutex locked twice.
        mutex = ctypes.create_string_buffer(64)
        pthread = ctypes.CDLL(None)
        pthread.pthread_mutex_lock(mutex)
        if os.fork() == 0:
            time.sleep(1)
            os.kill(os.getppid(), numbers[-1])
            os._exit(0)
        pthread.pthread_mutex_lock(mutex)
    os.kill(os.getpid(), numbers[-1])
    time.sleep(1)
    print("still here", flush=True)
"""


@pytest.fixture(autouse=True)
def _hangups_are_heard() -> Iterator[None]:
    """Whoever started the tests may have them ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def stubborn(echo_seconds: float, where: str, *numbers: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STUBBORN, str(echo_seconds), where, *(str(int(number)) for number in numbers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening() as listening:
        assert listening is stop
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal is number


def test_the_signals_are_those_that_schedulers_and_people_send() -> None:
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop


def test_the_former_handlers_come_back() -> None:
    def own(*_: object) -> None:
        raise AssertionError("not while listening")

    def ask_and_fail() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise ZeroDivisionError

    outside = signal.signal(signal.SIGUSR1, own)
    interrupt = signal.getsignal(signal.SIGINT)  # ignored, where a shell started this in the background
    try:
        stop = StopRequest()
        with pytest.raises(ZeroDivisionError), stop.listening():
            ask_and_fail()
        assert stop.signal is signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, outside)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    done = stubborn(0, "in Python", number, number)
    assert done.stdout == f"asked by {number.name}\n"
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"a second signal ({number.name}): ended at once, without a checkpoint\n"


def test_the_second_signal_ends_a_process_that_is_stuck_in_a_collective() -> None:
    done = stubborn(0, "stuck", signal.SIGTERM, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "asked by SIGTERM\n"), done.stderr


def test_the_same_request_again_at_once_is_an_echo() -> None:
    """Slurm sends to torchrun and to its workers, and torchrun to its workers again."""
    done = stubborn(60, "in Python", signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (0, "asked by SIGTERM\nstill here\n"), done.stderr


def test_the_limit_that_sigusr1_announced_is_no_second_request() -> None:
    done = stubborn(0, "in Python", signal.SIGUSR1, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (0, "asked by SIGUSR1\nstill here\n"), done.stderr
    done = stubborn(0, "in Python", signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "asked by SIGUSR1\n"), done.stderr


def test_a_forked_worker_dies_of_its_own_signals_and_its_parent_is_not_asked() -> None:
    stop = StopRequest()
    with stop.listening():
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(1)
        time.sleep(0.2)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        time.sleep(0.2)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop


INTERRUPTIBLE = """
import os, signal, sys, time
from llmtrain.signals import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell started this in the background
def outcome():
    if number == signal.SIGTERM:
        os.kill(os.getpid(), number)  # `timeout` sends it to the process, and to its group
    return "it is kept"
number = int(sys.argv[1])
with interruptible(outcome):
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(1)
    time.sleep(0.2)
    os.kill(worker, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM
    os.kill(os.getpid(), number)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_no_training_is_broken_off(number: signal.Signals) -> None:
    program = [sys.executable, "-c", INTERRUPTIBLE, str(int(number))]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (128 + number, "interrupted; it is kept\n")


def test_the_handler_of_sigterm_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.interruptible(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_echo_is_shorter_than_patience() -> None:
    assert 0.5 < signals.ECHO_SECONDS < 5
