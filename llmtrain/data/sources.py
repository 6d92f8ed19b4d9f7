"""Reading the documents of a source, one after another, never a whole corpus in memory.

A document is a `str` that encodes as UTF-8 (no lone surrogates) and is more than whitespace. The
order is that of the sorted files and of the documents in them.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data import huggingface, python_tree
from llmtrain.data.columns import check_string_column, missing_field
from llmtrain.data.files import expand, read_lines, read_text
from llmtrain.errors import InputError
from llmtrain.recipe.schema import HuggingFaceSource, JSONLSource, ParquetSource, PythonSource, Source, TextSource

log = logging.getLogger(__name__)


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
            return _read_text(source)
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


def _read_text(source: TextSource) -> Iterator[str]:
    for path in expand(source.paths, source.kind):
        if source.document == "file":
            yield read_text(path)
        elif source.document == "line":
            yield from (line.rstrip("\r\n") for _, line in read_lines(path))
        else:
            yield from _paragraphs(path)


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in read_lines(path):
        if line.isspace():
            yield "".join(lines).rstrip("\r\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).rstrip("\r\n")


def _read_jsonl(source: JSONLSource) -> Iterator[str]:
    for path in expand(source.paths, source.kind):
        for number, line in read_lines(path):
            if line.strip():  # a file that is a byte-order mark and no more has a line without an end
                yield _field_of_line(line, source.field, f"{path}:{number}")


def _field_of_line(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "write one JSON object a line; for a file that is one array: jq -c '.[]' in.json > out.jsonl"
        raise InputError(f"not JSON: {error}", where=where, remedy=remedy) from None
    if not isinstance(record, dict):
        remedy = f'write one JSON object a line, such as {{"{field}": "..."}}'
        raise InputError(f"a JSON {_json_type(record)}, not an object", where=where, remedy=remedy)
    if field not in record:
        raise missing_field(field, list(record), where)
    text = record[field]
    if not isinstance(text, str):
        remedy = "make it a string, or name another field"
        raise InputError(f"field {field!r} is a {_json_type(text)}, not a string", where=where, remedy=remedy)
    # json.loads accepts "\ud800" alone, which is no text: UTF-8 has no bytes for it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        message = f"field {field!r} has half of a surrogate pair ({half}) at character {error.start}"
        remedy = "it was cut inside an emoji or the like: remove it or write both halves"
        raise InputError(message, where=where, remedy=remedy) from None
    return text


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


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
        with _open_parquet(path) as file:
            schema = file.schema_arrow
            if source.field not in schema.names:
                raise missing_field(source.field, schema.names, str(path))
            check_string_column(schema.field(source.field).type, source.field, str(path))
            yield from _parquet_column(file, source.field, path)


def _parquet_column(file: pq.ParquetFile, field: str, path: Path) -> Iterator[str]:
    num_rows = num_null = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                num_rows += 1
                if text is None:
                    num_null += 1
                else:
                    yield text
    except UnicodeDecodeError as error:
        where = f"{path}: in the 1024 rows after row {num_rows}"
        raise InputError(f"column {field!r} is not UTF-8: {error}", where=where) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"broken Parquet after row {num_rows}: {error}", where=str(path)) from None
    if num_null:
        log.info("%s: %d of %d rows have no %r and were skipped", path, num_null, num_rows, field)
