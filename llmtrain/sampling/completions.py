"""`llmtrain generate --input prompts.jsonl --output completions.jsonl`: many prompts at once.

What is finished is appended to OUTPUT.partial, a whole line at a time, whose first line says what it is part of.
The same command goes on from there; OUTPUT appears when all rows are done, in the order of the input.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmtrain.data.files import open_binary
from llmtrain.data.progress import WorkProgress, row_progress
from llmtrain.data.records import Record
from llmtrain.errors import InputError, TrainingError
from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request
from llmtrain.sampling.generators import Generator
from llmtrain.sampling.infilling import check_no_holes, encode_prompt
from llmtrain.sampling.prompts import check_chat_template, check_messages, encode_messages
from llmtrain.sampling.rows import read_rows

ADDED = ("completions", "prompt_tokens")  # fields that a row of the output has beside its own


@dataclass(frozen=True)
class Summary:
    """What came of a batch: rows answered now, rows that were done before, rows left out for their length."""

    done: int
    before: int
    skipped: int
    tokens: int
    seconds: float


def check_output(output: Path) -> None:
    """Raises InputError where the output exists, or its directory does not."""
    if os.path.lexists(output):
        raise InputError(f"{output} exists", where="--output", remedy="name a new file, or remove it first")
    if not output.parent.is_dir():
        raise InputError(f"no such directory: {output.parent}", where="--output", remedy="make it first")


def complete_file(
    saved: Saved, input_file: Path, output: Path, rows: Sequence[Record], generator: Generator, num: int, skip: bool
) -> Summary:
    """Answers each row `num` times; see the module.

    Args:
        rows: those of `input_file`.
        skip: rows that do not fit the model's window are left without a completion, and counted.

    Raises:
        InputError: a row is wrong, or does not fit, or the partial output is of another command.
        TrainingError: the disk is full, or fails.
    """
    prompts = [_encode(saved, row) for row in rows]
    fits = [generator.fits(ids) for ids in prompts]
    if not all(fits) and not skip:
        raise _too_long(saved, rows, prompts, fits)
    partial = output.with_name(f"{output.name}.partial")
    header = _header(saved, input_file, generator.settings(), num, skip)
    done = _done_before(partial, header, len(rows))
    before = len(done)
    requests = [
        Request(prompts[index], index, sample)
        for index in range(len(rows))
        if fits[index] and index not in done
        for sample in range(num)
    ]
    with _disk_errors(output), partial.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            _append(file, header)
        with row_progress("generating", before + len(requests) // num, before) as progress:
            collect = _Collector(requests, num, done, file, progress)
            generator.generate(requests, collect)
            seconds = progress.seconds
    with _disk_errors(output):
        _write(output, rows, prompts, done)
        partial.unlink()
    return Summary(len(done) - before, before, fits.count(False), collect.tokens, seconds)


class _Collector:
    """Appends a row when all of its samples are there."""

    def __init__(
        self, requests: Sequence[Request], num: int, done: dict[int, list[Any]], file: IO[str], progress: WorkProgress
    ):
        self._requests, self._num, self._done, self._file, self._progress = requests, num, done, file, progress
        self._samples: dict[int, dict[int, Completion]] = {}
        self.tokens = 0

    def __call__(self, number: int, completion: Completion) -> None:
        request = self._requests[number]
        answers = self._samples.setdefault(request.row, {})
        answers[request.sample] = completion
        self.tokens += len(completion.ids)
        if len(answers) == self._num:
            self._done[request.row] = [_plain(answers[sample]) for sample in range(self._num)]
            _append(self._file, {"row": request.row, "completions": self._done[request.row]})
            del self._samples[request.row]
            self._progress.advance()


def _encode(saved: Saved, row: Record) -> list[int]:
    for name in ADDED:
        if name in row.fields:
            raise InputError(f"field {name!r} is what the output adds", where=row.where, remedy="rename the field")
    prompt, messages = row.fields.get("prompt"), row.fields.get("messages")
    if (prompt is None) == (messages is None):
        raise InputError(
            f"a row has either a prompt or messages; it has {'both' if prompt is not None else 'neither'}",
            where=row.where,
            remedy='write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
        )
    if isinstance(prompt, str):
        return encode_prompt(saved, prompt, row.where)
    conversation = check_messages(prompt if messages is None else messages, row.where)
    check_chat_template(saved, row.where, "give prompts as texts, or a tokenizer with a chat template")
    ids = encode_messages(saved.tokenizer, conversation, row.where, row.fields.get("tools"))
    check_no_holes(saved, ids, row.where)
    return ids


def _too_long(saved: Saved, rows: Sequence[Record], prompts: Sequence[list[int]], fits: Sequence[bool]) -> InputError:
    first = fits.index(False)
    return InputError(
        f"{fits.count(False)} of {len(rows)} prompts do not fit the model's window of {saved.window} tokens; "
        f"this one has {len(prompts[first])}",
        where=rows[first].where,
        remedy="shorten them, or leave them without a completion by --skip-long",
    )


def _header(saved: Saved, input_file: Path, settings: Mapping[str, Any], num: int, skip: bool) -> dict[str, Any]:
    with open_binary(input_file) as file:
        digest = hashlib.sha256(file.read()).hexdigest()  # its rows are in memory, too
    model = {"path": saved.location.path, "base": saved.location.base, "dtype": str(saved.decoder.dtype)}
    return {"input_sha256": digest, "model": model, "num": num, "skip_long": skip, **_listed(settings)}


def _listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _done_before(partial: Path, header: Mapping[str, Any], num_rows: int) -> dict[int, list[Any]]:
    """The rows that an interrupted command finished; a line that it was just writing is cut off."""
    if not os.path.isfile(partial):
        return {}
    with _disk_errors(partial):
        content = partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(partial, len(whole))
    lines = whole.splitlines()
    try:
        entries = [json.loads(line) for line in lines]
        done = {int(entry["row"]): entry["completions"] for entry in entries[1:]}
    except (ValueError, KeyError, TypeError):
        entries, done = [None], {}
    if not lines:
        return {}
    if entries[0] != header or any(not 0 <= row < num_rows for row in done):
        raise InputError(
            f"{partial} is what another command, or the same with another input or model, left",
            where="--output",
            remedy="give the settings that it was begun with, remove it to begin again, or name another output",
        )
    return done


def _plain(completion: Completion) -> dict[str, Any]:
    return {"text": completion.text, "finish_reason": completion.finish, "tokens": len(completion.ids)}


def _append(file: IO[str], entry: Mapping[str, Any]) -> None:
    """One whole line, down to the file."""
    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    file.flush()


def _write(output: Path, rows: Sequence[Record], prompts: Sequence[list[int]], done: Mapping[int, list[Any]]) -> None:
    aside = output.with_name(f".writing-{output.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                added = {"completions": done.get(index, []), "prompt_tokens": len(prompts[index])}
                file.write(json.dumps(row.fields | added, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}\n"
            "  remedy: make room or get permission; the same command goes on where it was"
        ) from None


def read_input(input_file: Path) -> list[Record]:
    """The rows of --input."""
    return read_rows(input_file, "--input")
