"""Small JSON objects beside the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import InputError
from llmtrain.models.beside import check_fields, read_beside, write_beside


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "thing.json"
    assert read_beside(file, 3, dict) is None
    write_beside(file, 3, {"a": 1, "b": None})
    assert json.loads(file.read_text()) == {"format": 3, "a": 1, "b": None}
    assert read_beside(file, 3, dict) == {"a": 1, "b": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "it is no JSON object"),
        ('{"a": 1}', "cannot be read: KeyError.*format"),
        ('{"format": 4, "a": 1}', "of a format that this version does not read"),
        ('{"format": 3, "b": 1}', "cannot be read.*'b'"),
    ],
)
def test_what_is_none(text: str, said: str, tmp_path: Path) -> None:
    def make(a: Any) -> Any:
        return a

    file = tmp_path / "thing.json"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        read_beside(file, 3, make)
    assert caught.value.where == str(file) and caught.value.remedy


def test_a_wrong_field_is_named_with_its_value(tmp_path: Path) -> None:
    check_fields({"a": 1}, {"a": False}, tmp_path)
    with pytest.raises(InputError, match="b is 'x'"):
        check_fields({"a": 1, "b": "x"}, {"a": False, "b": True}, tmp_path)
