"""Checks of the field or column that holds the text, shared by the kinds of sources."""

from collections.abc import Sequence

import pyarrow as pa

from llmtrain.errors import InputError, nearest


def missing_field(field: str, present: Sequence[str], where: str) -> InputError:
    """The error for a field or column that is not there."""
    there = ", ".join(present) if present else "none"
    message = f"no field {field!r}; fields there: {there}{nearest(field, present)}"
    return InputError(message, where=where, remedy="set `field` of this source to one of them")


def check_string_column(column_type: pa.DataType, field: str, where: str) -> None:
    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if not (
        pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_string_view(value_type)
    ):
        remedy = "name a column of strings"
        raise InputError(f"column {field!r} holds {column_type}, not strings", where=where, remedy=remedy)
