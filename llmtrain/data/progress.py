"""Progress of long work, on stderr: a bar on a terminal, a line now and then elsewhere; short work shows nothing."""

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0  # shorter work shows nothing
SECONDS_BETWEEN_LINES = 10.0


class WorkProgress:
    """Counts what is done, of `total` where that is known.

    Args:
        what: names the work.
        total: in the unit of `columns` and `amounts`.
        done: of it, what was done before.
        columns: how a bar shows amounts.
        amounts: how a line does: from (done, a second).
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        done: int,
        columns: Sequence[ProgressColumn],
        amounts: Callable[[int, float], str],
    ):
        self.what, self.total, self.done = what, total, done
        self._before, self._columns, self._amounts = done, columns, amounts
        self._started = self._last_line = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:  # the total was an estimate
                self._bar.update(self._bar.task_ids[0], total=self.done, completed=self.done)
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.seconds < QUIET_SECONDS:
            return
        if self._console.is_terminal:
            self._show_bar()
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            if log.isEnabledFor(logging.INFO):  # a run, with logs of its own
                log.info("%s", self._line())
            else:
                self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def _show_bar(self) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                *self._columns,
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self.what, total=self.total, completed=self._before)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self.done)

    def _line(self) -> str:
        rate = (self.done - self._before) / self.seconds
        line = f"{self.what}: {self._amounts(self.done, rate)}"
        if self.total is None or self.total <= self.done:
            return line
        left = (self.total - self.done) / rate
        return f"{line}, {self.done / self.total:.0%}, about {left:.0f} s left"


def byte_progress(what: str, total: int | None) -> WorkProgress:
    """Of bytes of text.

    with byte_progress("tokenising", total) as progress:
        progress.advance(len(text.encode()))
    """

    def amounts(done: int, rate: float) -> str:
        return f"{done / 1e6:.1f} MB at {rate / 1e6:.1f} MB/s"

    return WorkProgress(what, total, 0, [DownloadColumn(), TransferSpeedColumn()], amounts)


def row_progress(what: str, total: int, done: int = 0) -> WorkProgress:
    """Of rows, of which `done` were done before."""

    def amounts(done: int, rate: float) -> str:
        return f"{done} of {total} rows"

    return WorkProgress(what, total, done, [MofNCompleteColumn()], amounts)
