"""New files that are there whole, or not at all."""

import os
from pathlib import Path

import pytest

from llmtrain.directories import new_files
from llmtrain.errors import TrainingError


def test_of_several_files_none_appears_where_one_cannot(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(TrainingError, match="cannot be written"), new_files(paths) as asides:
        asides[0].write_text("a")  # and b is never written
    assert list(tmp_path.iterdir()) == []


def test_what_stands_for_a_file_is_of_this_process_alone(tmp_path: Path) -> None:
    """Two commands that write to one name at the same time must not write into one file."""
    with new_files([tmp_path / "a"]) as [aside]:
        assert str(os.getpid()) in aside.name
        aside.write_text("a")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a"]
