"""metrics.jsonl and samples.jsonl: one JSON object a line, each with its step.

Strict JSON has no NaN and no Infinity: such a figure is written as null, under its name, and read
back as NaN. A reader thus tells "not finite" (null) from "not measured" (absent).
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.files import written_aside
from llmtrain.errors import InputError, TrainingError

log = logging.getLogger(__name__)

_WHOLE_NUMBERS = frozenset({"step", "tokens", "step_tokens", "peak_memory_bytes", "skipped"})


class MetricsLog:
    """Appends one object a line, handed to the operating system at once: a killed run loses none."""

    def __init__(self, path: Path, resume_step: int):
        """Opens `path`, and drops what was written after the checkpoint that the run goes on from.

        Args:
            path: the file, made if it is not there.
            resume_step: step of that checkpoint. At 0 the run begins anew, and nothing is kept.
        """
        self.path = path
        if path.exists():
            _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends `record`: numbers and texts, with at least `step`."""
        line = json.dumps({name: _plain(name, value) for name, value in record.items()}, allow_nan=False)
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects in order, null as NaN; a line torn by a kill or by a running writer is left out.

    Raises:
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError("no such file", where=str(path), remedy="name a run directory that has a metrics.jsonl")
    return [
        {name: math.nan if value is None else value for name, value in record.items()} for record, _ in _records(path)
    ]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if name in _WHOLE_NUMBERS else float(value)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record, line
            else:
                log.warning("%s:%d is no whole record (a kill tears the last line); left out", path, number)


def _drop_after(path: Path, resume_step: int) -> None:
    with written_aside(path) as kept:
        for record, line in _records(path):
            if resume_step > 0 and record["step"] <= resume_step:
                kept.write(line if line.endswith("\n") else line + "\n")
