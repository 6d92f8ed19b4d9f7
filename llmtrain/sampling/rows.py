"""JSON objects, one a line, with the place of each."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.data.files import read_lines, why_missing
from llmtrain.errors import InputError


class Row(NamedTuple):
    """One object and where it stands: file:line."""

    fields: dict[str, Any]
    where: str


def read_rows(path: Path, where: str | None = None) -> list[Row]:
    """The objects of a JSONL file; empty lines are passed over.

    Args:
        where: what to name where the file is not there; default: itself.

    Raises:
        InputError: with file and line.
    """
    if not os.path.isfile(path):  # unlike Path.is_file it raises nothing for a name that is too long
        raise InputError(f"{why_missing(path, 'file')}: {path}", where=where, remedy="correct the path")
    rows = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}", where=place, remedy="write one JSON object a line") from None
        if not isinstance(fields, dict):
            raise InputError(
                f"not a JSON object but {line.strip()[:40]!r}", where=place, remedy='write {"field": value, ...}'
            )
        rows.append(Row(fields, place))
    if not rows:
        raise InputError(f"{path} has no rows", where=where, remedy="write one JSON object a line")
    return rows
