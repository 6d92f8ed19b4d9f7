"""Progress of long data work, on stderr: a bar on a terminal, a line now and then elsewhere."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0  # shorter work shows nothing
SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Counts bytes of text done, of `total` where that is known.

    with ByteProgress("tokenising", total) as progress:
        progress.advance(len(text.encode()))
    """

    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done = what, total, 0
        self._started = self._last_line = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "ByteProgress":
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

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.seconds < QUIET_SECONDS:
            return
        if self._console.is_terminal:
            self._show_bar()
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("%s", self._line())

    def _show_bar(self) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self.done)

    def _line(self) -> str:
        rate = self.done / self.seconds
        line = f"{self.what}: {self.done / 1e6:.1f} MB at {rate / 1e6:.1f} MB/s"
        if self.total is None or self.total <= self.done:
            return line
        left = (self.total - self.done) / rate
        return f"{line}, {self.done / self.total:.0%}, about {left:.0f} s left"
