"""The rows of a JSONL file that a model is asked about."""

import os
from pathlib import Path

from llmtrain.data.files import why_missing
from llmtrain.data.records import Record, check_strings
from llmtrain.data.sources import places_and_objects
from llmtrain.errors import InputError


def read_rows(path: Path, where: str | None = None) -> list[Record]:
    """The objects of a JSONL file; blank lines are passed over.

    Args:
        where: what to name where the file is not there; default: itself.

    Raises:
        InputError: with file and line.
    """
    if not os.path.isfile(path):  # unlike Path.is_file it raises nothing for a name that is too long
        raise InputError(f"{why_missing(path, 'file')}: {path}", where=where, remedy="correct the path")
    rows = []
    for place, fields, may_be_half in places_and_objects([path], '{"prompt": "..."}'):
        if may_be_half:  # no tokenizer takes it, and no file can be written with it
            check_strings(fields, "", place)
        rows.append(Record(fields, place))
    if not rows:
        raise InputError(f"{path} has no rows", where=where, remedy="write one JSON object a line")
    return rows
