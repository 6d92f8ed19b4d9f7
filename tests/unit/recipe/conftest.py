"""Recipes to work on."""

from pathlib import Path

import pytest

from tests.unit.recipe.minimal import MINIMAL, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file into a fresh directory, by default a complete recipe."""

    def _write(text: str = MINIMAL, name: str = "recipe.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return _write
