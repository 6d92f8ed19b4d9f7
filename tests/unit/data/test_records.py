"""Whole records with their places, from every kind of source."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from llmtrain.data.records import Record, read_records
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Source

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "😀"}, {"role": "assistant", "content": "b"}], "n": 1},
    {"messages": [{"role": "user", "content": "c"}], "n": None},
]


def source(**values: Any) -> Source:
    made: Source = TypeAdapter(Source).validate_python(values)
    return made


def read(**values: Any) -> list[Record]:
    return list(read_records(source(**values)))


def error_of(**values: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(**values)
    return caught.value


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n \n")
    assert read(kind="jsonl", paths=[str(file)]) == [Record(ROWS[0], f"{file}:1"), Record(ROWS[1], f"{file}:3")]


def test_parquet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(ROWS * 600), tmp_path / f"{name}.parquet")
    records = read(kind="parquet", paths=[f"{tmp_path}/*.parquet"])
    assert [record.fields for record in records] == ROWS * 1200
    assert [records[i].where for i in (0, 1199, 1200)] == [
        f"{tmp_path}/a.parquet: row 1",
        f"{tmp_path}/a.parquet: row 1200",
        f"{tmp_path}/b.parquet: row 1",
    ]


def test_saved_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS * 200).save_to_disk(str(tmp_path))
    records = read(kind="huggingface", path=str(tmp_path))
    assert [record.fields for record in records] == ROWS * 200
    assert records[300].where == f"{tmp_path}: row 301"


def test_tables_fill_no_nulls_into_calls_and_tools(tmp_path: Path) -> None:
    """Arrow gives every struct of a column the members of all of them; JSON Lines hold what was written."""

    def row(name: str, arguments: dict[str, Any], column: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {argument: {"type": "string"} for argument in arguments}
        described = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
        return {"messages": messages, column: [described], "n": {name: None}}

    for column, more in (("tools", {}), ("functions", {"columns": {"tools": "functions"}})):
        rows = [row("add", {"a": 1, "list": [{"x": 1}, {"y": 2}]}, column), row("get", {"city": "x"}, column)]
        directory = tmp_path / column
        datasets.Dataset.from_list(rows).save_to_disk(str(directory))
        pq.write_table(pa.Table.from_pylist(rows), f"{directory}.parquet")
        for made in (
            {"kind": "huggingface", "path": str(directory)},
            {"kind": "parquet", "paths": [f"{directory}.parquet"]},
        ):
            records = read(**made, **more)
            for record, written in zip(records, rows, strict=True):
                assert record.fields[column] == written[column]
                assert record.fields["messages"][1]["tool_calls"] == written["messages"][1]["tool_calls"]
                assert record.fields["messages"][0]["tool_calls"] is None  # other nulls are left to the formats
                assert record.fields["n"] == {"add": None, "get": None}
    own = row("add", {"a": None}, "tools")
    (tmp_path / "a.jsonl").write_text(json.dumps(own))
    assert read(kind="jsonl", paths=[f"{tmp_path}/a.jsonl"])[0].fields == own


@pytest.mark.parametrize("line", ['[{"text": "a"}]', '[\n  {"text": "a"}\n]'])
def test_a_file_that_is_one_array_is_told_how_to_be_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    error = error_of(kind="jsonl", paths=[f"{tmp_path}/a.jsonl"])
    assert error.remedy and "jq -c '.[]' in.json > out.jsonl" in error.remedy


def test_texts_are_records_of_one_field(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\n \ntwo\nlines\n\nthree\n")
    assert read(kind="text", paths=[str(file)]) == [Record({"text": file.read_text()}, str(file))]
    lines = read(kind="text", paths=[str(file)], document="line")
    assert [record.where for record in lines] == [f"{file}:{n}" for n in (1, 4, 5, 7)]
    paragraphs = read(kind="text", paths=[str(file)], document="paragraph")
    assert paragraphs == [
        Record({"text": "one"}, f"{file}:1"),
        Record({"text": "two\nlines"}, f"{file}:4"),
        Record({"text": "three"}, f"{file}:7"),
    ]
    (tmp_path / "a.py").write_text("x = 1\n")
    assert read(kind="python", path=str(tmp_path)) == [Record({"text": "x = 1\n"}, f"{tmp_path}: document 1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "us', "not JSON"),
        ("[1]", "a JSON array, not an object"),
        ('{"messages": [{"content": "a"}, {"content": "ab\\ud83d"}]}', "field 'messages[1].content' has half of a"),
        ('{"a\\ud83d": 1}', "the name of a field has half of a surrogate pair"),
    ],
)
def test_broken_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"messages": []}}\n{line}\n')
    error = error_of(kind="jsonl", paths=[str(file)])
    assert error.where == f"{file}:2" and message in error.message and error.remedy


def test_whole_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "😀"}))
    assert "\\ud83d" in file.read_text()
    assert read(kind="jsonl", paths=[str(file)])[0].fields == {"text": "😀"}


def test_wrong_encoding_names_file_line_and_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n{"text": "na\xefve"}\n')
    error = error_of(kind="jsonl", paths=[str(file)])
    assert error.where == f"{file}:2" and "not UTF-8: byte 0xef at byte offset 29" in error.message
    assert error.remedy and "iconv" in error.remedy


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"not parquet at all")
    assert "cannot be read as Parquet" in error_of(kind="parquet", paths=[str(file)]).message
    invalid = pa.array([b"fine", b"na\xefve"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(invalid), invalid.buffers())
    pq.write_table(pa.table({"prompt": text}), file)
    error = error_of(kind="parquet", paths=[str(file)])
    assert "a column is not UTF-8" in error.message and error.where == f"{file}: in the 1024 rows after row 0"


def test_one_record_after_another(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 10 + b"\xff\n")
    records = read_records(source(kind="jsonl", paths=[str(file)]))
    assert [next(records).where for _ in range(10)] == [f"{file}:{n}" for n in range(1, 11)]
