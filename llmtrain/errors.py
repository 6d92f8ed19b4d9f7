"""The errors a person reads, and the exit codes that scripts read.

Exit codes: 0 done as asked; 2 bad recipe or input; 75 preempted and checkpointed, run again to go
on (75 is EX_TEMPFAIL of sysexits.h, which Slurm scripts and supervisors know); 130 interrupted at the
keyboard outside of training (128 + SIGINT, as shells have it), and 143 by SIGTERM; 1 failed otherwise.
"""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class LLMTrainError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code = EXIT_FAILED


class InputError(LLMTrainError):
    """What the user gave is wrong: recipe, data, model directory, environment.

    Args:
        message: what is wrong, naming the value and what is allowed.
        where: file and line, recipe key, or command-line argument.
        remedy: the next thing to do.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None):
        self.message, self.where, self.remedy = message, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  remedy: {self.remedy}" if self.remedy else text


class TrainingError(LLMTrainError):
    """The run cannot go on, through no fault of the input: it diverged, or the disk is full."""


class RankLost(TrainingError):
    """Another rank is gone or does not answer; rank 0 says so for all."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint such as "; did you mean 'steps'?", or an empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
