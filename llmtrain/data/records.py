"""Whole records of a source with their place: what fine-tuning reads in place of documents."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llmtrain.data import huggingface, python_tree
from llmtrain.data.files import expand
from llmtrain.data.sources import check_surrogates, parquet_batches, places_and_objects, places_and_texts
from llmtrain.recipe.schema import HuggingFaceSource, JSONLSource, ParquetSource, PythonSource, Source, TextSource

EXAMPLE_OBJECT = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Record(NamedTuple):
    """A JSON object, a row of a table, or {"text": a document}.

    Attributes:
        fields: JSON values by name; every string encodes as UTF-8.
        where: its place, such as "chats.jsonl:12" or "chats.parquet: row 12" (both from 1).
    """

    fields: dict[str, Any]
    where: str


def read_records(source: Source) -> Iterator[Record]:
    """The records of a source in a fixed order, one batch of rows in memory at a time.

    Blank lines, and documents of nothing but whitespace, are no records. From tables, tools and tool calls come
    without members that are null; in JSON Lines a null is the writer's own.

    Raises:
        InputError: missing files, wrong encoding, broken JSON or Parquet, with file and line.
    """
    match source:
        case TextSource():
            for where, text in places_and_texts(source):
                if text and not text.isspace():
                    yield Record({"text": text}, where)
        case PythonSource():
            for number, text in enumerate(python_tree.read(source), start=1):
                if text and not text.isspace():
                    yield Record({"text": text}, f"{source.path}: document {number}")
        case JSONLSource():
            for where, fields, may_be_half in places_and_objects(expand(source.paths, source.kind), EXAMPLE_OBJECT):
                if may_be_half:
                    check_strings(fields, "", where)
                yield Record(fields, where)
        case ParquetSource():
            for record in _read_parquet(source):
                yield Record(_unfilled(record.fields, source.columns.get("tools", "tools")), record.where)
        case HuggingFaceSource():
            for number, fields in enumerate(huggingface.read_rows(source), start=1):
                yield Record(_unfilled(fields, source.columns.get("tools", "tools")), f"{source.path}: row {number}")


def _unfilled(value: Any, tools: str = "tool_calls") -> Any:
    """The value without the nulls that Arrow fills into structs, within tool calls and the column of tools.

    All structs of a column have the members of every one of them, so that a call has the arguments of other
    functions, as null. A null that was meant cannot be told from those and is dropped, too.
    """
    if isinstance(value, dict):
        inside = ("tool_calls", tools)
        return {key: _without_nulls(item) if key in inside else _unfilled(item) for key, item in value.items()}
    return [_unfilled(item) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(source: ParquetSource) -> Iterator[Record]:
    for path in expand(source.paths, source.kind):
        number = 0
        for rows in parquet_batches(path):
            for fields in rows:
                number += 1
                yield Record(fields, f"{path}: row {number}")


def check_strings(value: Any, name: str, where: str) -> None:
    """Refuses half of a surrogate pair in any string, naming it as messages[2].content."""
    if isinstance(value, str):
        check_surrogates(value, f"field {name!r}", where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_strings(item, f"{name}[{index}]", where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_surrogates(key, "the name of a field", where)
            check_strings(item, f"{name}.{key}" if name else key, where)
