"""Reading each kind of source, and what bad input says."""

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from llmtrain.data.sources import describe, num_bytes, read_documents
from llmtrain.errors import InputError
from llmtrain.recipe import schema
from llmtrain.recipe.schema import Source


def source(**values: Any) -> Source:
    adapted: Source = TypeAdapter(Source).validate_python(values)
    return adapted


def read(**values: Any) -> list[str]:
    return list(read_documents(source(**values)))


def error_of(**values: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(**values)
    return caught.value


# ------------------------------------------------------------------------------------------ text


def test_text_files_are_read_in_sorted_order_each_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    found = read(kind="text", paths=[f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt"])
    assert found == [f"text of {name}" for name in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt")]
    assert num_bytes(source(kind="text", paths=[f"{tmp_path}/*.txt"])) == 2 * len("text of a.txt")


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    text = "  one\r\n\ttwo \0 ▁ 😀\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert read(kind="text", paths=[f"{tmp_path}/*.txt"]) == [text, "marked"]


def test_text_documents_can_be_lines_or_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n  two\n \n\n\nthree\n\t\nfour")
    assert read(kind="text", paths=[str(file)], document="line") == ["one", "  two", "three", "four"]
    assert read(kind="text", paths=[str(file)], document="paragraph") == ["one\r\n  two", "three", "four"]


def test_empty_and_blank_documents_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\t\u2003")
    assert read(kind="text", paths=[f"{tmp_path}/*.txt"]) == []


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracketed")
    assert read(kind="text", paths=[str(tmp_path / "a[1].txt")]) == ["bracketed"]


@pytest.mark.parametrize(
    ("path", "message"), [("missing.txt", "no such file"), ("*.md", "matches no file"), ("", "is a directory")]
)
def test_paths_that_name_no_file_are_errors(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("here")
    error = error_of(kind="text", paths=[str(tmp_path / "a.txt"), os.path.join(tmp_path, path)])
    assert message in error.message and error.remedy
    assert error.where == os.path.join(tmp_path, path)


@pytest.mark.parametrize(("kind", "ending"), [("text", "txt"), ("jsonl", "jsonl"), ("parquet", "parquet")])
def test_in_place_of_a_directory_its_files_are_suggested(tmp_path: Path, kind: str, ending: str) -> None:
    error = error_of(kind=kind, paths=[str(tmp_path)])
    assert error.remedy == f"name its files, for example {tmp_path}/**/*.{ending}"


def test_why_a_path_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    assert error_of(kind="text", paths=[f"{tmp_path}/a.txt/b"]).message.startswith("Not a directory")
    for kind in ("text", "python"):
        key = "path" if kind == "python" else "paths"
        name = f"{tmp_path}/{'x' * 300}"
        error = error_of(kind=kind, **{key: name if kind == "python" else [name]})
        assert error.message.startswith("File name too long") and error.remedy


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_wrong_encoding_names_file_line_and_byte(tmp_path: Path, document: str) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"fine\nalso f\xc3\xbcne\nna\xefve\n")
    error = error_of(kind="text", paths=[str(file)], document=document)
    assert error.where == f"{file}:3"
    assert "0xef at byte offset 18" in error.message
    assert error.remedy and "iconv -f LATIN1" in error.remedy


def test_utf16_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "wide.txt"
    file.write_bytes("wide".encode("utf-16"))
    error = error_of(kind="text", paths=[str(file)])
    assert error.remedy and "iconv -f UTF-16" in error.remedy


def test_reading_does_not_hold_the_corpus(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\n" * 10 + b"\xff\n")
    documents = read_documents(source(kind="text", paths=[str(file)], document="line"))
    assert [next(documents) for _ in range(10)] == ["good"] * 10  # the eleventh line is not yet looked at


# ----------------------------------------------------------------------------------------- JSONL


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"text": "one\ntwo", "n": 1}, {"n": 2, "text": "😀 \u2028"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read(kind="jsonl", paths=[str(file)]) == ["one\ntwo", "😀 \u2028"]
    file.write_text('{"body": "other"}\n')
    assert read(kind="jsonl", paths=[str(file)], field="body") == ["other"]


def test_jsonl_of_other_editors(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n\r\n \n\n')
    assert read(kind="jsonl", paths=[str(file)]) == ["one", "two"]
    for nothing in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\n", b""):
        file.write_bytes(nothing)
        assert read(kind="jsonl", paths=[str(file)]) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "a JSON array, not an object"),
        ("null", "a JSON null, not an object"),
        ('{"txt": "a", "id": 3}', "no field 'text'; fields there: txt, id; did you mean 'txt'?"),
        ("{}", "no field 'text'; fields there: none"),
        ('{"text": 3}', "field 'text' is a number, not a string"),
        ('{"text": null}', "field 'text' is a null, not a string"),
        ('{"text": "ab\\ud83d"}', "half of a surrogate pair (\\ud83d) at character 2"),
    ],
)
def test_bad_jsonl_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    error = error_of(kind="jsonl", paths=[str(file)])
    assert error.where == f"{file}:3"
    assert message in error.message and error.remedy


# --------------------------------------------------------------------------------------- Parquet


def test_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"row {i}" for i in range(3000)]
    table = pa.table({"id": range(3001), "text": [*texts, None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    encoded = pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()})
    pq.write_table(encoded, tmp_path / "b.parquet")
    with caplog.at_level(logging.INFO):
        assert read(kind="parquet", paths=[f"{tmp_path}/*.parquet"]) == [*texts, "x", "y", "x"]
    assert "1 of 3001 rows have no 'text'" in caplog.text
    size = num_bytes(source(kind="parquet", paths=[f"{tmp_path}/*.parquet"]))
    assert size is not None and size > 0


def test_bad_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "n": [1]}), file)
    error = error_of(kind="parquet", paths=[str(file)])
    assert "no field 'text'; fields there: texts, n; did you mean 'texts'?" in error.message
    assert "holds int64, not strings" in error_of(kind="parquet", paths=[str(file)], field="n").message
    file.write_bytes(b"not parquet at all")
    error = error_of(kind="parquet", paths=[str(file)])
    assert error.where == str(file) and "cannot be read as Parquet" in error.message


def test_broken_parquet_pages_are_an_input_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row number {i}" for i in range(5000)]}), file, compression="snappy")
    data = bytearray(file.read_bytes())
    data[100:400] = b"\xff" * 300
    file.write_bytes(data)
    assert "broken Parquet" in error_of(kind="parquet", paths=[str(file)]).message


# ---------------------------------------------------------------------------------------- Python


def test_python_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = '"""About a."""\n\n\nclass C:\n    """About C.\n\n    More.\n    """\n\n    def f(self): "About f."\n'
    (tmp_path / "sub").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / "a.py").write_text(module)
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'naïve'\n".encode("latin-1"))
    (tmp_path / "sub" / "bad.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "sub" / "worse.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "sub" / "unparsable.py").write_text("def f(:\n")
    (tmp_path / "sub" / "z.py").write_text('def f():\n    "half \\ud800"\n')
    (tmp_path / ".venv" / "hidden.py").write_text("x = 1\n")
    sources = [module, "# coding: latin-1\nx = 'naïve'\n", "def f(:\n", 'def f():\n    "half \\ud800"\n']
    docstrings = ["About a.", "About C.\n\nMore.", "About f."]
    with caplog.at_level(logging.INFO):
        assert read(kind="python", path=str(tmp_path)) == sources
    assert "of 6 Python files, 2 do not decode and 0 do not parse" in caplog.text
    with caplog.at_level(logging.INFO):
        assert read(kind="python", path=str(tmp_path), content="docstrings") == docstrings
    assert "2 do not decode and 1 do not parse" in caplog.text
    assert read(kind="python", path=str(tmp_path), content="both") == [module, *docstrings, *sources[1:]]


def test_the_standard_library_is_read_without_its_tests() -> None:
    texts = read(kind="python")
    assert sum(map(len, texts)) > 5_000_000
    assert not any("test.support" in text and "class TestCase" in text for text in texts)
    for text in texts:
        text.encode("utf-8")


def test_python_directories_that_are_none(tmp_path: Path) -> None:
    assert "no such directory" in error_of(kind="python", path=str(tmp_path / "missing")).message
    assert "holds no .py file" in error_of(kind="python", path=str(tmp_path)).message
    (tmp_path / "a.py").write_text("x = 1")
    assert "is no directory" in error_of(kind="python", path=str(tmp_path / "a.py")).message


# ---------------------------------------------------------------------------------- Hugging Face


def test_saved_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", None, "two"], "n": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "splits"))
    with caplog.at_level(logging.INFO):
        assert read(kind="huggingface", path=str(tmp_path / "plain")) == ["one", "two"]
    assert "1 of 3 rows have no 'text'" in caplog.text
    assert read(kind="huggingface", path=str(tmp_path / "splits"), split="test") == ["one"]
    assert num_bytes(source(kind="huggingface", path=str(tmp_path / "plain")))

    error = error_of(kind="huggingface", path=str(tmp_path / "splits"), split="tests")
    assert "no split 'tests'; splits there: train, test; did you mean 'test'?" in error.message
    assert "no field 'txt'" in error_of(kind="huggingface", path=str(tmp_path / "plain"), field="txt").message
    assert "not strings" in error_of(kind="huggingface", path=str(tmp_path / "plain"), field="n").message
    assert "neither config" in error_of(kind="huggingface", path=str(tmp_path / "plain"), config="c").message


def test_a_saved_split_is_not_taken_for_another(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one"]}, split="test")
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read(kind="huggingface", path=str(tmp_path / "saved"), split="test") == ["one"]
    assert "no split 'train'" in error_of(kind="huggingface", path=str(tmp_path / "saved")).message


def test_directory_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (directory / "test.jsonl").write_text('{"text": "three"}\n')
    assert read(kind="huggingface", path=str(directory)) == ["one", "two"]
    assert read(kind="huggingface", path=str(directory), split="test") == ["three"]
    error = error_of(kind="huggingface", path=str(directory), split="dev")
    assert error.where == str(directory) and "dev" in error.message and error.remedy


def test_datasets_that_are_not_there(tmp_path: Path) -> None:
    assert "no such directory" in error_of(kind="huggingface", path=str(tmp_path / "missing")).message
    assert "cannot be loaded" in error_of(kind="huggingface", path="nobody/nothing").message
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in error_of(kind="huggingface", path=str(tmp_path / "empty")).message
    (tmp_path / "file.json").write_text("{}")
    assert "is a file" in error_of(kind="huggingface", path=str(tmp_path / "file.json")).message


def test_descriptions_tell_sources_apart() -> None:
    assert describe(source(kind="text", paths=["a", "b", "c"])) == "text a and 2 more"
    assert describe(source(kind="python")) == "python stdlib"


def test_a_compressed_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text"))
    source = schema.TextSource(kind="text", paths=[str(tmp_path / "a.txt.gz")])
    with pytest.raises(InputError, match=r"a\.txt\.gz: it is compressed"):
        list(read_documents(source))
