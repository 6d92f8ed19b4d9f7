"""Standard output and error that may go away: the reader of a pipe ends, a terminal is closed, a disk is full.

What is written then is dropped, because a run writes its files too and is worth more than its
console. (Python's own streams raise, and whatever prints, a progress bar or a warning, dies of it.)
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Forgiving(io.FileIO):
    """A file descriptor that takes whatever it is given, and drops what cannot be written.

    Attributes:
        lost: why something was, where it was not because nobody reads it any more.
    """

    lost: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                # For good, and for C++ and child processes too, which write to the same descriptor.
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, self.fileno())
                os.close(silence)
            else:
                self.lost = self.lost or error
            return len(memoryview(content).cast("B"))


@contextmanager
def outliving_the_console() -> Iterator[Callable[[], OSError | None]]:
    """In here sys.stdout and sys.stderr never raise; where a caller has replaced them, they stay as they are.

    Gives what says why some of standard output could not be written: None where all of it was, or its reader left.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield lambda: None
        return
    _open_closed()
    before = sys.stdout, sys.stderr
    output, sys.stdout = _forgiving(sys.stdout, 1)
    _, sys.stderr = _forgiving(sys.stderr, 2)

    def unwritten() -> OSError | None:
        sys.stdout.flush()
        return output.lost

    try:
        yield unwritten
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Standard descriptors that were closed lead nowhere: or the next files that are opened would get their numbers,
    and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


def _forgiving(stream: Any, number: int) -> tuple[_Forgiving, io.TextIOWrapper]:
    if stream is None:  # it was closed
        stream = open(number, "w", closefd=False)  # noqa: SIM115  (the descriptor outlives it)
    stream.flush()
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    lines = stream.line_buffering or number == 2
    return raw, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=lines)
