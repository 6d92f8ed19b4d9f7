"""Reading the documents of a source, one after another, never a whole corpus in memory.

A document is a `str` that encodes as UTF-8 (no lone surrogates) and is more than whitespace. The
order is that of the sorted files and of the documents in them.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data import huggingface, python_tree
from llmtrain.data.columns import check_string_column, missing_field
from llmtrain.data.files import expand, read_lines, read_text
from llmtrain.errors import InputError
from llmtrain.recipe.schema import HuggingFaceSource, JSONLSource, ParquetSource, PythonSource, Source, TextSource

log = logging.getLogger(__name__)

PARQUET_BATCH = 1024


def read_documents(source: Source) -> Iterator[str]:
    """The documents of a source in a fixed order.

    Raises:
        InputError: missing files, wrong encoding, missing or mistyped fields, with file and line.
    """
    for text in _read(source):
        if text and not text.isspace():
            yield text


def _read(source: Source) -> Iterator[str]:
    match source:
        case TextSource():
            return (text for _, text in places_and_texts(source))
        case JSONLSource():
            return _read_jsonl(source)
        case ParquetSource():
            return _read_parquet(source)
        case PythonSource():
            return python_tree.read(source)
        case HuggingFaceSource():
            return huggingface.read(source)


def describe(source: Source) -> str:
    """A few words that tell sources apart in messages."""
    match source:
        case PythonSource() | HuggingFaceSource():
            return f"{source.kind} {source.path}"
        case TextSource() | JSONLSource() | ParquetSource():
            more = f" and {len(source.paths) - 1} more" if len(source.paths) > 1 else ""
            return f"{source.kind} {source.paths[0]}{more}"


def num_bytes(source: Source) -> int | None:
    """About how many bytes of text there are, for progress; None where only reading would tell."""
    match source:
        case TextSource() | JSONLSource():
            return sum(path.stat().st_size for path in expand(source.paths, source.kind))
        case ParquetSource():
            return sum(_column_bytes(path, source.field) for path in expand(source.paths, source.kind))
        case PythonSource():
            paths = python_tree.files(source)
            return sum(path.stat().st_size for path in paths) if source.content == "source" else None
        case HuggingFaceSource():
            return huggingface.num_bytes(source)


def places_and_texts(source: TextSource) -> Iterator[tuple[str, str]]:
    """(file, or file:line where it begins; document), blank ones included."""
    for path in expand(source.paths, source.kind):
        if source.document == "file":
            yield str(path), read_text(path)
        elif source.document == "line":
            yield from ((f"{path}:{number}", line.rstrip("\r\n")) for number, line in read_lines(path))
        else:
            yield from ((f"{path}:{number}", text) for number, text in _paragraphs(path))


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    lines: list[str] = []
    first = 1
    for number, line in read_lines(path):
        if line.isspace():
            yield first, "".join(lines).rstrip("\r\n")
            lines, first = [], number + 1
        else:
            lines.append(line)
    yield first, "".join(lines).rstrip("\r\n")


def places_and_objects(paths: Iterable[Path], example: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(file:line, the object, whether some string of it may hold half of a surrogate pair).

    Args:
        paths: of JSON Lines; blank lines are passed over.
        example: an object as it should be, for messages.

    Raises:
        InputError: not UTF-8, not JSON, or no object.
    """
    for path in paths:
        for number, line in read_lines(path):
            if line.strip():  # a file that is a byte-order mark and no more has a line without an end
                where = f"{path}:{number}"
                # Only an escape can make half of a pair: the line itself is UTF-8.
                yield where, _object_of_line(line, where, example), "\\u" in line


def _object_of_line(line: str, where: str, example: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "write one JSON object a line; for a file that is one array: jq -c '.[]' in.json > out.jsonl"
        raise InputError(f"not JSON: {error}", where=where, remedy=remedy) from None
    if not isinstance(record, dict):
        whole = "; for a file that is one array: jq -c '.[]' in.json > out.jsonl" if isinstance(record, list) else ""
        remedy = f"write one JSON object a line, such as {example}{whole}"
        raise InputError(f"a JSON {json_type(record)}, not an object", where=where, remedy=remedy)
    return record


def _read_jsonl(source: JSONLSource) -> Iterator[str]:
    field = source.field
    for where, record, may_be_half in places_and_objects(expand(source.paths, source.kind), f'{{"{field}": "..."}}'):
        if field not in record:
            raise missing_field(field, list(record), where)
        text = record[field]
        if not isinstance(text, str):
            remedy = "make it a string, or name another field"
            raise InputError(f"field {field!r} is a {json_type(text)}, not a string", where=where, remedy=remedy)
        if may_be_half:
            check_surrogates(text, f"field {field!r}", where)
        yield text


def check_surrogates(text: str, what: str, where: str) -> None:
    """Refuses half of a UTF-16 surrogate pair: json.loads takes "\\ud800" alone, for which UTF-8 has no bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        message = f"{what} has half of a surrogate pair ({half}) at character {error.start}"
        remedy = "it was cut inside an emoji or the like: remove it or write both halves"
        raise InputError(message, where=where, remedy=remedy) from None


def json_type(value: object) -> str:
    """What JSON calls a value that json.loads gave."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        remedy = "name Parquet files, or give the source another kind (text, jsonl)"
        raise InputError(f"cannot be read as Parquet: {error}", where=str(path), remedy=remedy) from None


def _column_bytes(path: Path, field: str) -> int:
    with _open_parquet(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _read_parquet(source: ParquetSource) -> Iterator[str]:
    for path in expand(source.paths, source.kind):
        num_rows = num_null = 0
        for texts in parquet_batches(path, source.field):
            num_rows += len(texts)
            num_null += texts.count(None)
            yield from (text for text in texts if text is not None)
        if num_null:
            log.info("%s: %d of %d rows have no %r and were skipped", path, num_null, num_rows, source.field)


def parquet_batches(path: Path, field: str | None = None) -> Iterator[list[Any]]:
    """The rows of a file, 1024 at a time: the strings of one column, or None for whole rows as dicts.

    Raises:
        InputError: no Parquet, no such column, one of another type, a broken page, or a string that is not UTF-8.
    """
    num_rows = 0
    with _open_parquet(path) as file:
        schema = file.schema_arrow
        if field is not None:
            if field not in schema.names:
                raise missing_field(field, schema.names, str(path))
            check_string_column(schema.field(field).type, field, str(path))
        try:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=None if field is None else [field]):
                yield batch.to_pylist() if field is None else batch.column(0).to_pylist()
                num_rows += batch.num_rows
        except UnicodeDecodeError as error:
            what = "a column" if field is None else f"column {field!r}"
            where = f"{path}: in the {PARQUET_BATCH} rows after row {num_rows}"
            raise InputError(f"{what} is not UTF-8: {error}", where=where) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"broken Parquet after row {num_rows}: {error}", where=str(path)) from None
