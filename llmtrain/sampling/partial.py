"""Completions that an interrupted command does not lose: they stand in OUTPUT.partial until the output is there.

Each line is whole or is not counted. The first says what the file is part of, so that only the same command goes on
with it; each other one has the completions of one unit of its work, such as a row of the input.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmtrain.data.progress import WorkProgress, row_progress
from llmtrain.directories import new_file
from llmtrain.errors import InputError, TrainingError
from llmtrain.sampling.batched import Completion, Request
from llmtrain.sampling.generators import Generator

Unit = tuple[int, ...]
"""Names a unit of the work, such as (row,)."""
Keep = Callable[[Unit, list[dict[str, Any]]], None]
"""Keeps the results of a unit that is done."""


@dataclass(frozen=True)
class Work:
    """What `Partial.answer` did: units answered now and before, new tokens, seconds."""

    done: int
    before: int
    tokens: int
    seconds: float


class Partial:
    """The completions of a command, kept in OUTPUT.partial as they come.

    Args:
        header: all that decides what is generated.

    Attributes:
        completions: of each unit that is done, in the order of its requests: text, finish_reason and tokens of each.

    Raises:
        InputError: OUTPUT.partial is of another command.
        TrainingError: it cannot be read.
    """

    def __init__(self, output: Path, header: Mapping[str, Any]):
        self._output, self._path = output, output.with_name(f"{output.name}.partial")
        self._header = json.loads(json.dumps(header))  # as it is read back
        self.completions = self._read()

    def answer(self, generator: Generator, units: Mapping[Unit, Sequence[Request]], what: str = "generating") -> Work:
        """Answers what is not yet answered.

        Args:
            units: requests, at least one each.
            what: names the work while it goes on.

        Raises:
            TrainingError: the disk is full, or fails.
        """
        missing = {unit: requests for unit, requests in units.items() if unit not in self.completions}
        before = len(units) - len(missing)
        with self.appending() as keep, row_progress(what, len(units), before) as progress:
            collect = _Collector(missing, keep, progress)
            generator.generate(collect.requests, collect)
            return Work(len(missing), before, collect.tokens, progress.seconds)

    @contextmanager
    def appending(self) -> Iterator[Keep]:
        """What keeps the results of a unit; for work that is not done by a generator.

        Raises:
            TrainingError: the disk is full, or fails.
        """
        with _disk_errors(self._output), self._path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                _append(file, self._header)

            def keep(unit: Unit, results: list[dict[str, Any]]) -> None:
                self.completions[unit] = results
                _append(file, {"unit": unit, "completions": results})

            yield keep

    def finish(self, outputs: Mapping[Path, Iterable[Mapping[str, Any]]]) -> None:
        """Writes the outputs, each of them whole, in their order, and removes OUTPUT.partial.

        Raises:
            TrainingError: the disk is full, or fails.
        """
        for output, rows in outputs.items():
            _write(output, rows)
        with _disk_errors(self._path):
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[Unit, list[dict[str, Any]]]:
        """What an interrupted command finished; a line that it was just writing is cut off."""
        if not os.path.isfile(self._path):
            return {}
        with _disk_errors(self._path):
            content = self._path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(self._path, len(whole))
        lines = whole.splitlines()
        try:
            entries = [json.loads(line) for line in lines]
            done = {tuple(entry["unit"]): entry["completions"] for entry in entries[1:]}
        except (ValueError, KeyError, TypeError):
            entries, done = [None], {}
        if lines and entries[0] != self._header:
            raise InputError(
                f"{self._path} is what another command, or the same with another input or model, left",
                where="--output",
                remedy="give the settings that it was begun with, remove it to begin again, or name another output",
            )
        return done


class _Collector:
    """Appends a unit when all of its requests are answered."""

    def __init__(self, units: Mapping[Unit, Sequence[Request]], keep: Keep, progress: WorkProgress):
        self.requests = [request for requests in units.values() for request in requests]
        self._places = [(unit, place) for unit, requests in units.items() for place in range(len(requests))]
        self._missing = {unit: len(requests) for unit, requests in units.items()}
        self._answers: dict[Unit, dict[int, Completion]] = {}
        self._keep, self._progress = keep, progress
        self.tokens = 0

    def __call__(self, number: int, completion: Completion) -> None:
        unit, place = self._places[number]
        answers = self._answers.setdefault(unit, {})
        answers[place] = completion
        self.tokens += len(completion.ids)
        self._missing[unit] -= 1
        if self._missing[unit] == 0:
            self._keep(unit, [_plain(answers[place]) for place in range(len(answers))])
            del self._answers[unit]
            self._progress.advance()


def _plain(completion: Completion) -> dict[str, Any]:
    return {"text": completion.text, "finish_reason": completion.finish, "tokens": len(completion.ids)}


def _append(file: IO[str], entry: Mapping[str, Any]) -> None:
    """One whole line, down to the file."""
    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    file.flush()


def _write(output: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with new_file(output) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}\n"
            "  remedy: make room or get permission; the same command goes on where it was"
        ) from None
