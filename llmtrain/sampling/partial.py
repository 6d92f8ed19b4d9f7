"""Completions that an interrupted command does not lose: they stand in OUTPUT.partial until the output is there.

Each line is whole or is not counted. The first says what the file is part of, so that only the same command goes on
with it; each other one has the completions of one unit of its work, such as a row of the input. A file that begins
otherwise is left as it is.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmtrain.data.progress import WorkProgress, row_progress
from llmtrain.directories import check_new_file, new_files
from llmtrain.errors import InputError, TrainingError
from llmtrain.sampling.batched import Completion, Request
from llmtrain.sampling.generators import Generator

Unit = tuple[int, ...]
"""Names a unit of the work, such as (row,)."""
Keep = Callable[[Unit, list[dict[str, Any]]], None]
"""Keeps the results of a unit that is done."""
Write = Callable[[Path], None]
"""Writes a file."""

_GOES_ON = "make room or get permission; the same command goes on where it was"


def partial_of(output: Path) -> Path:
    """OUTPUT.partial."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, where: str = "--output", inputs: Iterable[Path] = ()) -> None:
    """Raises InputError where the output exists or cannot be made, or OUTPUT.partial is one of the inputs."""
    check_new_file(output, where)
    partial = partial_of(output)
    if partial.resolve() in [file.resolve() for file in inputs]:
        raise InputError(
            f"{partial} is read, and until {output} is whole what is done would stand there",
            where=where,
            remedy="name another output",
        )


def outcome(output: Path) -> str:
    """What an interrupted command leaves of its output, and how to go on."""
    partial = partial_of(output)
    if os.path.exists(partial):
        return f"what is done is in {partial}, from where the command that began it goes on"
    return "nothing was done yet"


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
        output: None keeps them in memory only.
        header: all that decides what is generated.

    Attributes:
        completions: of each unit that is done, in the order of its requests: text, finish_reason and tokens of each.

    Raises:
        InputError: OUTPUT.partial is of another command.
        TrainingError: it cannot be read.
    """

    def __init__(self, output: Path | None, header: Mapping[str, Any]):
        self._path = None if output is None else partial_of(output)
        self._header = json.loads(json.dumps(header))  # as it is read back
        self.completions: dict[Unit, list[dict[str, Any]]] = {}
        if self._path is not None and os.path.isfile(self._path):
            self.completions = _read(self._path, self._header)

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
        if self._path is None:
            yield self.completions.__setitem__
            return
        with _disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                _append(file, self._header)

            def keep(unit: Unit, results: list[dict[str, Any]]) -> None:
                self.completions[unit] = results
                _append(file, {"unit": unit, "completions": results})

            yield keep

    def finish(self, outputs: Mapping[Path, Iterable[Mapping[str, Any]]]) -> None:
        """Writes rows of JSON into the outputs, which appear when all are whole, and removes OUTPUT.partial.

        Raises:
            TrainingError: the disk is full, or fails, or an output was made by another meanwhile.
        """
        self.finish_by({output: rows_writer(rows) for output, rows in outputs.items()})

    def finish_by(self, outputs: Mapping[Path, Write]) -> None:
        """As `finish`, of files of any kind."""
        with new_files(list(outputs), _GOES_ON) as asides:
            for aside, write in zip(asides, outputs.values(), strict=True):
                write(aside)
        if self._path is not None:
            with _disk_errors(self._path):
                self._path.unlink(missing_ok=True)


def _read(path: Path, header: Any) -> dict[Unit, list[dict[str, Any]]]:
    """What an interrupted command finished; a line that it was just writing is cut off.

    Raises:
        InputError: the file is of another command, and is left as it is.
        TrainingError: it cannot be read, or be cut.
    """
    with _disk_errors(path):
        content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        entries = [json.loads(line) for line in whole]
        done = {tuple(entry["unit"]): entry["completions"] for entry in entries[1:]}
        is_ours = entries[0] == header if entries else _line(header).encode().startswith(content)
    except (ValueError, KeyError, TypeError):
        is_ours, done = False, {}
    if not is_ours:
        raise InputError(
            f"{path} is what another command, or the same with another input or model, left",
            where="--output",
            remedy="give the settings that it was begun with, remove it to begin again, or name another output",
        )
    if len(whole) < len(lines):
        with _disk_errors(path):
            os.truncate(path, sum(map(len, whole)))
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


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _append(file: IO[str], entry: Mapping[str, Any]) -> None:
    """One whole line, down to the file."""
    file.write(_line(entry))
    file.flush()


def rows_writer(rows: Iterable[Mapping[str, Any]]) -> Write:
    """What writes rows as JSON lines."""

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as opened:
            opened.writelines(map(_line, rows))

    return write


def text_writer(text: str) -> Write:
    """What writes a text, and a line break after it."""

    def write(file: Path) -> None:
        file.write_text(text + "\n", encoding="utf-8")

    return write


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}\n  remedy: {_GOES_ON}") from None
