"""verdict.json: how the newest start of a run ended, for scripts that cannot see the ranks' exit codes.

torchrun exits with 1 whatever its workers' code was. So rank 0 writes down how the run ended before
any rank leaves, and launchers read it: `llmtrain verdict RECIPE` exits with the code of the run.
While a run is alive the file says "running"; a run that was killed leaves it so.
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, InputError
from llmtrain.recipe.loading import LoadedRecipe, load_recipe
from llmtrain.recipe.resolved import RESOLVED, identity, identity_differences

FILE = "verdict.json"
Name = Literal["running", "done", "preempted", "failed", "bad input"]
_NAMES: dict[int, Name] = {EXIT_DONE: "done", EXIT_PREEMPTED: "preempted", EXIT_BAD_INPUT: "bad input"}


class Verdict(BaseModel):
    """The content of verdict.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    verdict: Name
    exit_code: int | None = Field(description="None while running.")
    step: int = Field(description="Optimizer steps done.")
    steps: int | None = Field(description="Of the whole run; None where it ended before that was known.")
    time: str = Field(description="UTC, ISO 8601.")
    message: str

    @property
    def seconds(self) -> float:
        """When it was written, in seconds since the epoch."""
        return datetime.fromisoformat(self.time).timestamp()


def write_verdict(directory: Path, exit_code: int | None, step: int, steps: int | None, message: str) -> None:
    """Writes verdict.json, whole or not at all; an exit code of None says that the run is running."""
    from llmtrain.checkpoint.files import written_aside  # here: it imports torch, and readers do not need it

    name: Name = "running" if exit_code is None else _NAMES.get(exit_code, "failed")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    verdict = Verdict(verdict=name, exit_code=exit_code, step=step, steps=steps, time=now, message=message)
    with written_aside(directory / FILE) as file:
        file.write(verdict.model_dump_json(indent=1) + "\n")


def read_verdict(directory: Path) -> Verdict | None:
    """The verdict in a run directory; None where there is none.

    Raises:
        InputError: the file is none of ours.
    """
    path = directory / FILE
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), remedy="delete it and run again") from None


def tell(loaded: LoadedRecipe, since: float, wait_seconds: float, stopped: bool) -> tuple[str, int]:
    """How the run of a recipe ended, in one line, and the exit code that says the same.

    Args:
        since: seconds since the epoch; what was written before is of an earlier start and does not count.
        wait_seconds: how long to wait for a run that has not ended: its last ranks may still be
            leaving, and a network disk shows its files late.
        stopped: whether the launcher was asked to stop: then a run that had not begun may be run again.

    Raises:
        InputError: the directory holds another recipe's run.
    """
    directory = loaded.recipe.run_directory
    _check_recipe(directory, loaded)
    deadline = time.monotonic() + wait_seconds
    while True:
        verdict = read_verdict(directory)
        ended = verdict is not None and verdict.exit_code is not None and verdict.seconds >= since
        if ended or time.monotonic() >= deadline:
            return _line(verdict if verdict is None or verdict.seconds >= since else None, directory, stopped)
        time.sleep(0.2)


def _line(verdict: Verdict | None, directory: Path, stopped: bool) -> tuple[str, int]:
    if verdict is None and stopped:
        return f"preempted: stopped before the run began ({directory})", EXIT_PREEMPTED
    if verdict is None:
        return f"no verdict: no run has begun in {directory}", EXIT_FAILED
    if verdict.exit_code is None:
        return f"no verdict: the run in {directory} is running, or was killed", EXIT_FAILED
    of = "" if verdict.steps is None else f" at step {verdict.step} of {verdict.steps}"
    reason = verdict.message.partition("\n")[0]
    return f"{verdict.verdict}{of}{f': {reason}' if reason else ''} ({directory})", verdict.exit_code


def _check_recipe(directory: Path, loaded: LoadedRecipe) -> None:
    """Raises InputError where the directory is of another recipe, whose verdict is not this one's."""
    file = directory / RESOLVED
    if not file.is_file():
        return
    differences = identity_differences(identity(load_recipe(file).recipe), identity(loaded.recipe))
    if differences:
        keys = ", ".join(key for key, _, _ in differences[:5])
        raise InputError(
            f"the directory holds another recipe's run: they differ in {keys}",
            where=str(directory),
            remedy="give the name=... and the settings that the run was started with",
        )
