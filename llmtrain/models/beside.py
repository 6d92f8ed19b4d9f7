"""Small JSON objects beside the weights of a model: what these do not tell."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.errors import InputError

REMEDY = "bring the file back that was saved with the weights"
T = TypeVar("T")


def write_beside(file: Path, number: int, content: Mapping[str, Any]) -> None:
    """Writes an object of the format of this number."""
    text = json.dumps({"format": number, **content}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def read_beside(file: Path, number: int, make: Callable[..., T]) -> T | None:
    """What `make` makes of the object's fields; None where there is no file.

    Raises:
        InputError: it is of another format than that of this number, holds something else, or cannot be read.
    """
    if not file.is_file():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if content.pop("format") != number:
            raise InputError(
                "it is of a format that this version does not read", where=str(file), remedy="update llmtrain"
            )
        return make(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot be read: {error!r}", where=str(file), remedy=REMEDY) from None


def check_fields(fields: Mapping[str, Any], wrong: Mapping[str, bool], file: Path) -> None:
    """Raises InputError, which names the first field that is wrong and its value."""
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(f"{field} is {fields[field]!r}", where=str(file), remedy=REMEDY)
