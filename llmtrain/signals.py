"""Being asked to stop: by Slurm, torchrun, a spot instance, or a person at the keyboard."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llmtrain.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

# SIGUSR1 is what sbatch --signal sends ahead of the time limit; SIGTERM comes with preemption; SIGHUP
# when the terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Launchers pass on what they get themselves, so that one request may arrive twice: Slurm sends to
# every process of a job, and torchrun sends the same to its workers again.
ECHO_SECONDS = 2.0


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when torchrun is killed; to be called as early as can be.

    Its ranks are sessions of their own: they would go on with nobody looking after them, or wait
    for its store for ever. With it they save and end, or end at once where nothing has begun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """Set by the first signal; the loop reads it where all ranks can agree to stop. The second ends the process.

    A thread takes the signals, told by the interpreter's own C handler: Python's handlers run in the
    main thread only, which may be deep in a collective.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted_at = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catches the signals in here, and gives the former handlers back at the end.

        SIGHUP stays ignored where it was: nohup has set it so.
        """
        caught = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        thread = threading.Thread(target=self._take, args=(reading,), name="signals", daemon=True)
        thread.start()
        before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in caught}
        _IN_PARENT.update(caught)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _IN_PARENT.clear()
            signal.set_wakeup_fd(before_fd)
            os.write(writing, b"\0")
            thread.join()
            os.close(reading)
            os.close(writing)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, at once if it runs Python; counting is the other thread's."""
        if self.signal is None:
            self.signal = signal.Signals(number)

    def _take(self, reading: int) -> None:
        first: int | None = None
        while (number := os.read(reading, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if first is None or (first == signal.SIGUSR1 and number == signal.SIGTERM):
                # SIGTERM after SIGUSR1 is the limit that SIGUSR1 announced, and no impatience.
                first, self._noted_at = number, now
                self.signal = self.signal or signal.Signals(number)
            elif now - self._noted_at > ECHO_SECONDS:
                threading.Timer(1.0, os._exit, (128 + number,)).start()  # if the console hangs
                name = signal.Signals(number).name
                sys.stderr.write(f"a second signal ({name}): ended at once, without a checkpoint\n")
                os._exit(128 + number)


@contextmanager
def interruptible(outcome: Callable[[], str]) -> Iterator[None]:
    """In here SIGTERM, which Slurm and `timeout` send, is as Ctrl-C: what runs is broken off, with one line.

    For commands that are no training, which takes such a signal for a request to stop.

    Args:
        outcome: what is kept, and how to go on.

    Raises:
        SystemExit: it was interrupted.
    """
    asked_at: float | None = None

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        is_echo = asked_at is not None and time.monotonic() - asked_at < ECHO_SECONDS
        asked_at = asked_at or time.monotonic()
        if not is_echo:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    _IN_PARENT.add(signal.SIGTERM)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {outcome()}\n")
        raise SystemExit(EXIT_INTERRUPTED if asked_at is None else EXIT_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        _IN_PARENT.clear()


_IN_PARENT: set[int] = set()


def _forget() -> None:
    """A forked worker dies of a signal as it should, and does not tell its parent of it."""
    if _IN_PARENT:
        signal.set_wakeup_fd(-1)
        for number in _IN_PARENT:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
