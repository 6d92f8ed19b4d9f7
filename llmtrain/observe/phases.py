"""What the main thread is doing, noted where a watchdog can read it."""

from collections.abc import Iterator
from contextlib import contextmanager

START_UP = "start-up"


class Phases:
    """The phase that the main thread is in, since when, and how far the run is.

    Noting a phase costs a microsecond: two assignments, which another thread reads as they come.

    Attributes:
        starting: until training begins; in it nothing is lost when the run stops.
        current: name of the phase, and when it began.
        now: the time, in seconds; a watchdog advances it, and without one it stands still.
        step: optimizer steps done.
        num_steps: steps of the whole run; None until it is known.
    """

    def __init__(self) -> None:
        self.starting = True
        self.now = 0.0
        self.current = (START_UP, 0.0)
        self.step = 0
        self.num_steps: int | None = None

    def begin_training(self, step: int, num_steps: int) -> None:
        """The start-up is over; what is in no other phase is in "training" from here on."""
        self.step, self.num_steps = step, num_steps
        self.starting, self.current = False, ("training", self.now)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What is in here is in this phase; its time is not that of a phase around it."""
        (outer, began), entered = self.current, self.now
        self.current = (name, entered)
        try:
            yield
        finally:
            self.current = (outer, began + self.now - entered)
