"""Being asked to stop: once politely, twice for good. Real signals, to this process and to one of its own."""

import os
import signal
import subprocess
import sys

import pytest

from llmtrain.signals import SIGNALS, StopRequest

# Imports nothing but the module and what it needs, so that it starts at once.
STUBBORN = """
import os, signal, sys
from llmtrain.signals import StopRequest
stop = StopRequest()
with stop.listening():
    number = int(sys.argv[1])
    os.kill(os.getpid(), number)
    print("asked by", stop.signal.name, flush=True)
    os.kill(os.getpid(), number)
    print("still here", flush=True)
"""


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
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


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
    finally:
        signal.signal(signal.SIGUSR1, outside)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN, str(int(number))], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"asked by {number.name}\n"
    assert done.returncode == -number, done.stderr
