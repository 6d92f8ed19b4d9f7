"""Standard output and error that may go away: the reader of a pipe ends, a terminal is closed.

What is written then is dropped, because a run writes its files too and is worth more than its
console. (Python's own streams raise, and whatever prints, a progress bar or a warning, dies of it.)
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Forgiving(io.FileIO):
    """A file descriptor that takes whatever it is given, and drops what cannot be written."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                # For good, and for C++ and child processes too, which write to the same descriptor.
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, self.fileno())
                os.close(silence)
            return len(memoryview(content).cast("B"))


@contextmanager
def outliving_the_console() -> Iterator[None]:
    """In here sys.stdout and sys.stderr never raise; where a caller has replaced them, they stay as they are."""
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__ or None in (sys.stdout, sys.stderr):
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _forgiving(sys.stdout), _forgiving(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _forgiving(stream: Any) -> io.TextIOWrapper:
    stream.flush()
    raw = io.BufferedWriter(_Forgiving(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(
        raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering or stream is sys.__stderr__
    )
