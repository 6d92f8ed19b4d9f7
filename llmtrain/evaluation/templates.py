"""Texts with {field} in them: field names only, no attributes, formats or code."""

import re
from collections.abc import Mapping
from typing import Any

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def fields_of(template: str) -> list[str]:
    """The fields that a template names.

    Raises:
        ValueError: a bracket stands alone, or holds nothing.
    """
    names = []
    for part in _PART.finditer(template):
        if part[0] in ("{", "}") or part[1] == "":
            raise ValueError(f"{part[0]!r} at character {part.start()}; write {{field}}, and {{{{ for a bracket")
        if part[1] is not None:
            names.append(part[1])
    return names


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """The template with the fields' values; all that `fields_of` names must be there."""

    def value(part: re.Match[str]) -> str:
        return part[0][0] if part[1] is None else str(fields[part[1]])

    return _PART.sub(value, template)
