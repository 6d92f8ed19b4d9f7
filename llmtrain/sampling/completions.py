"""`llmtrain generate --input prompts.jsonl --output completions.jsonl`: many prompts at once.

OUTPUT appears when all rows are done, in the order of the input; until then they stand in OUTPUT.partial.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.data.files import open_binary
from llmtrain.data.hashing import identity
from llmtrain.data.records import Record
from llmtrain.errors import InputError
from llmtrain.models.saved import Location, Saved
from llmtrain.sampling.batched import Request
from llmtrain.sampling.generators import Generator
from llmtrain.sampling.infilling import check_no_holes, encode_prompt
from llmtrain.sampling.partial import Partial, Unit
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
    partial = Partial(output, _header(saved, input_file, generator.settings(), num, skip))
    units: dict[Unit, list[Request]] = {
        (index,): [Request(ids, index, sample) for sample in range(num)]
        for index, ids in enumerate(prompts)
        if fits[index]
    }
    work = partial.answer(generator, units)
    partial.finish({output: _with_completions(rows, prompts, partial.completions)})
    return Summary(work.done, work.before, fits.count(False), work.tokens, work.seconds)


def _with_completions(
    rows: Sequence[Record], prompts: Sequence[Sequence[int]], done: Mapping[Unit, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(rows):
        yield row.fields | {"completions": done.get((index,), []), "prompt_tokens": len(prompts[index])}


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
    model = named(saved.location, saved.decoder.dtype)
    return {"input_sha256": digest, "model": model, "num": num, "skip_long": skip, **settings}


def named(location: Location, dtype: torch.dtype) -> dict[str, Any]:
    """What tells a model from others in a partial output; one that was trained again in the same place is another."""
    places = [Path(place) for place in (location.path, location.base) if place is not None]
    files = [file for place in places for file in _identities(place)]
    return {"path": location.path, "base": location.base, "dtype": str(dtype), "files": files}


def _identities(directory: Path) -> list[list[Any]]:
    """Name and identity of each file of weights; none for a name on the hub."""
    files = sorted(directory.rglob("*.safetensors"))
    return [[str(file.relative_to(directory)), *identity(file)] for file in files]


def read_input(input_file: Path) -> list[Record]:
    """The rows of --input."""
    return read_rows(input_file, "--input")
