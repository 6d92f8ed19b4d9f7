"""The documentation names what there is: functions, the lines that it quotes, keys of recipes, recipes, options."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from llmtrain.recipe.schema.algorithm import Algorithm
from llmtrain.recipe.shipped import comparison_names, recipe_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "algorithms").glob("*.md"))
DOCS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]

_PLACE = re.compile(r"(llmtrain/[\w/]+\.py):([\w.]+)")
_QUOTED = re.compile(r"```python\n# (llmtrain/[\w/]+\.py):([\w.]+)\n(.*?)```", re.DOTALL)

of_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
of_doc = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)


def test_there_are_pages() -> None:
    assert {"autoregressive", "masked_diffusion", "block_diffusion", "score_entropy", "sampling", "likelihood"} <= {
        page.stem for page in PAGES
    }


@cache
def definitions(file: str) -> dict[str, list[str]]:
    """The lines of each function and class of a file, stripped, by dotted name."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, list[str]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                yield name, [line.strip() for line in lines[child.lineno - 1 : child.end_lineno]]
                yield from walk(child, f"{name}.")

    return dict(walk(ast.parse(text), ""))


@of_page
def test_every_place_exists(page: Path) -> None:
    places = _PLACE.findall(page.read_text(encoding="utf-8"))
    assert places
    for file, name in places:
        assert (ROOT / file).is_file(), file
        assert name.rstrip(".") in definitions(file), f"{file} has no {name}"


@of_page
def test_every_quoted_line_stands_where_it_is_said_to(page: Path) -> None:
    quoted = _QUOTED.findall(page.read_text(encoding="utf-8"))
    assert quoted
    for file, name, code in quoted:
        lines = [line.strip() for line in code.splitlines()]
        assert lines, f"{file}:{name} quotes nothing"
        for line in lines:
            assert line in definitions(file)[name], f"{file}:{name} has no line {line!r}"


@of_page
def test_every_key_exists(page: Path) -> None:
    kinds = get_args(get_args(Algorithm)[0])
    known = {field for kind in kinds for field in kind.model_fields}
    assert set(re.findall(r"`algorithm\.(\w+)", page.read_text(encoding="utf-8"))) <= known


@of_page
def test_every_recipe_exists(page: Path) -> None:
    named = set(re.findall(r"`(diffusion/[\w.-]+)`", page.read_text(encoding="utf-8")))
    assert named <= {*recipe_names(), *comparison_names()}


@of_page
def test_every_option_exists(page: Path) -> None:
    files = (ROOT / "llmtrain").glob("cli_*.py")
    commands = "".join(file.read_text(encoding="utf-8") for file in files)
    parameters = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", commands, re.MULTILINE)}
    known = parameters | set(re.findall(r'["/]--([\w-]+)', commands))
    assert set(re.findall(r"--([a-z][a-z-]+)", page.read_text(encoding="utf-8"))) <= known


@of_doc
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
