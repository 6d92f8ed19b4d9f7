"""How far the run is: one live line on a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.observe.console import CONSOLE

_FIRST_STEPS = 3  # plain lines for each of these
_PLAIN_SECONDS = 10.0  # then a plain line so often ...
_PLAIN_SHARE = 0.05  # ... or after this share of the steps, whichever comes first
_PLAIN_GROWTH = 0.01  # but no oftener than this share of the time run so far: days make no 10^4 lines
_REFRESHES_PER_SECOND = 4
_BAR_WIDTHS = (40, 8)  # at most, at least


class Progress:
    """Shows the steps of one run; used as a context manager, on rank 0 only.

    Args:
        total_steps: steps of the whole run.
        done_steps: those done before this process started.
        clock: seconds, monotonic; tests give their own.
    """

    def __init__(
        self,
        total_steps: int,
        done_steps: int,
        console: Console = CONSOLE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.step = total_steps, done_steps
        self._first_step, self._console, self._clock = done_steps, console, clock
        self._figures: dict[str, float] = {}
        self._begun = clock()
        self._timed_from: tuple[int, float] | None = None  # step and time after the first step
        self._printed_step, self._printed_time = done_steps, self._begun
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_SECOND, transient=False)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a finished step: loss, tokens_per_second, mfu, and eval_loss when there is one."""
        now = self._clock()
        self.step = step
        self._figures.update(figures)
        if step == self._first_step:  # what was measured before the first step says nothing of the pace
            return
        if self._timed_from is None:  # the first step compiles and warms up: it would spoil the estimate
            self._timed_from = step, now
        if self._live is None and self._line_is_due(now):
            self._printed_step, self._printed_time = step, now
            self._console.print(self.line(), markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Time to the last step at the pace since the first step, evaluations and checkpoints included."""
        if self._timed_from is None:
            return None
        from_step, from_time = self._timed_from
        if self.step == from_step:
            seconds_a_step = (from_time - self._begun) / (self.step - self._first_step)
        else:
            seconds_a_step = (self._clock() - from_time) / (self.step - from_step)
        return seconds_a_step * (self.total_steps - self.step)

    def line(self) -> str:
        """The plain line."""
        return ", ".join([f"step {self.step}/{self.total_steps}", *self._parts()])

    def _line_is_due(self, now: float) -> bool:
        if self.step - self._first_step <= _FIRST_STEPS or self.step == self.total_steps:
            return True
        waited = now - self._printed_time
        if waited < _PLAIN_GROWTH * (now - self._begun):
            return False
        return waited >= _PLAIN_SECONDS or self.step - self._printed_step >= _PLAIN_SHARE * self.total_steps

    def _parts(self) -> list[str]:
        """What stands beside the step, the most wanted first."""
        figures, parts = self._figures, []
        if "loss" in figures:
            parts.append(f"loss {figures['loss']:.4f}")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{readable_seconds(left)} left")
        if "tokens_per_second" in figures:
            parts.append(f"{readable_count(figures['tokens_per_second'])} tokens/s")
        if "eval_loss" in figures:
            parts.append(f"eval loss {figures['eval_loss']:.4f}")
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.1%}")
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line that fits: what does not is left out from the least wanted, the bar first of all."""
        # One column less than there is: a full line makes some terminals wrap.
        room = options.max_width - 1
        texts = [f"step {self.step}/{self.total_steps}"]
        for part in self._parts():
            if sum(len(text) + 2 for text in texts) + len(part) > room:
                break
            texts.append(part)
        shown = "  ".join(texts)
        bar_width = min(_BAR_WIDTHS[0], room - len(shown) - 2)
        if bar_width < _BAR_WIDTHS[1]:
            yield Text(shown[: max(room, 1)], no_wrap=True)
            return
        line = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=self.total_steps, completed=self.step, width=bar_width)
        line.add_row(bar, Text(shown, no_wrap=True))
        yield line


def readable_seconds(seconds: float) -> str:
    """75 -> "1:15", 90000 -> "1 d 1:00:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def readable_count(number: float) -> str:
    """950 -> "950", 12345 -> "12.3k"."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}T"
