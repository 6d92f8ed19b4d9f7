import io

import pytest
from rich.console import Console

from llmtrain.observe.progress import Progress, readable_count, readable_seconds

FIGURES = {"loss": 3.21456, "tokens_per_second": 12345.6, "mfu": 0.634, "eval_loss": 3.5}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _run(total: int, seconds_a_step: float, first_step_seconds: float = 0.0) -> list[str]:
    """The plain lines of a whole run with steps of that length."""
    out, clock = io.StringIO(), Clock()
    with Progress(total, 0, Console(file=out, width=40), clock) as progress:
        for step in range(1, total + 1):
            clock.now += first_step_seconds if step == 1 and first_step_seconds else seconds_a_step
            progress.update(step, FIGURES)
    return out.getvalue().splitlines()


def _steps(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("step ").partition("/")[0]) for line in lines]


def test_a_plain_line_has_everything_and_is_not_wrapped() -> None:
    line = _run(100, 1.0)[0]
    assert line == "step 1/100, loss 3.2146, 1:39 left, 12.3k tokens/s, eval loss 3.5000, MFU 63.4%"


def test_quick_steps_are_shown_every_five_percent() -> None:
    assert _steps(_run(1000, 0.01)) == [1, 2, 3, *range(53, 1000, 50), 1000]


def test_slow_steps_are_shown_every_ten_seconds() -> None:
    assert _steps(_run(1000, 2.0))[:6] == [1, 2, 3, 8, 13, 18]


def test_days_give_no_endless_log() -> None:
    assert len(_run(100_000, 3.0)) < 700


def test_the_first_step_does_not_spoil_the_estimate() -> None:
    lines = _run(10, 1.0, first_step_seconds=60.0)
    assert "9:00 left" in lines[0] and "0:08 left" in lines[1]


def test_a_resumed_run_counts_on() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(100, 90, Console(file=out), clock)
    assert progress.seconds_left() is None and progress.line() == "step 90/100"
    clock.now += 50
    progress.update(90, {"eval_loss": 3.0})  # before the first step: shown with the next line
    assert out.getvalue() == "" and progress.line() == "step 90/100, eval loss 3.0000"
    clock.now += 2
    progress.update(91, FIGURES)
    assert progress.seconds_left() == pytest.approx(52 * 9)  # all there is to go by
    clock.now += 2
    progress.update(92, FIGURES)
    assert progress.seconds_left() == pytest.approx(2 * 8)


@pytest.mark.parametrize("width", [1, 2, 5, 10, 20, 37, 40, 60, 79, 80, 120, 200, 400])
def test_the_live_line_is_one_line_at_any_width(width: int) -> None:
    out = io.StringIO()
    progress = Progress(1000, 0, Console(file=io.StringIO()), Clock())
    progress.update(400, FIGURES)
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(progress, end="")
    lines = out.getvalue().split("\n")
    assert len([line for line in lines if line]) <= 1 and all(len(line) < max(width, 2) for line in lines)
    if width >= 20:
        assert "step 400/1000" in out.getvalue()
    if width >= 120:
        assert "MFU 63.4%" in out.getvalue() and "━" in out.getvalue()


def test_readable() -> None:
    assert [readable_seconds(seconds) for seconds in (0, 9.6, 75, 3600, 90061)] == [
        "0:00",
        "0:10",
        "1:15",
        "1:00:00",
        "1 d 1:01:01",
    ]
    assert [readable_count(number) for number in (950, 12345, 2.5e6, 3e9, 4e12)] == [
        "950",
        "12.3k",
        "2.5M",
        "3.0G",
        "4.0T",
    ]
