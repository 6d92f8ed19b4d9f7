"""How far work on rows is, on stderr: a bar on a terminal, a line now and then elsewhere; short work shows nothing."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_QUIET_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


class RowProgress:
    """Counts rows done, of `total`, of which `done` were done before.

    with RowProgress("generating", len(rows)) as progress:
        progress.advance()
    """

    def __init__(self, what: str, total: int, done: int = 0):
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._last_line = time.monotonic()
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None

    def __enter__(self) -> "RowProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def advance(self, rows: int = 1) -> None:
        self._done += rows
        if self.seconds < _QUIET_SECONDS:
            return
        if self._console.is_terminal:
            self._show_bar()
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = self.seconds / (self._done - self._before) * (self._total - self._done)
            line = f"{self._what}: {self._done} of {self._total} rows, about {left:.0f} s left"
            self._console.print(line, markup=False, soft_wrap=True)

    def _show_bar(self) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self._what, total=self._total, completed=self._before)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._done)
