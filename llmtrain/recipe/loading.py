"""From a file name and overrides to a checked recipe.

All mistakes of a recipe are reported together, each with its file and line.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llmtrain.errors import InputError, nearest
from llmtrain.recipe import shipped, yaml_tree
from llmtrain.recipe.complaints import complaints
from llmtrain.recipe.merge import apply_override, merge, with_default_kinds
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import Recipe
from llmtrain.recipe.yaml_tree import Node

_MAX_BYTES = 1_000_000  # PyYAML reads some 100 kB a second


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the checked recipe, defaults filled in.
        path: its file.
        files: that file and those it extends, itself first.
        overrides: the `key=value` texts that were applied.
        tree: the merged recipe as written, with places.
    """

    recipe: Recipe
    path: Path
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    tree: Node

    def where(self, key: str) -> str:
        """`key`, dotted, with the file and line that set it, or that of the section above it.

        For errors about a value that only later turn out, such as a file that is not there.
        """
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        return f"{self.tree.place_of(path)}: {key}"

    @contextmanager
    def errors_located(self) -> Iterator[None]:
        """An error in here that names a key of the recipe names its file and line too."""
        try:
            yield
        except RecipeError as error:
            problems = [Problem(self._located(problem.place), problem.message) for problem in error.problems]
            raise RecipeError(str(self.path), problems) from error
        except InputError as error:
            where = None if error.where is None else self._located(error.where)
            raise InputError(error.message, where=where, remedy=error.remedy) from error

    def _located(self, place: str) -> str:
        return self.where(place) if place.partition(".")[0] in Recipe.model_fields else place


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads, merges and checks a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe such as quickstart or pretrain/llama-1b.
        overrides: `dotted.key=value` texts, applied in order; values are YAML.

    Raises:
        RecipeError: naming every mistake, each with file and line or override.
    """
    source = os.fspath(path)
    problems: list[Problem] = []
    file = recipe_file(source)
    files: list[Path] = []
    tree = read_chain(file, files, problems)
    if tree is None:
        raise RecipeError(source, problems)
    if "variants" in tree.value:
        place = tree.value["variants"].place
        raise RecipeError(source, [Problem(place, f"it has variants: run it with `llmtrain compare {source}`")])
    tree = with_default_kinds(tree)
    for override in overrides:
        tree = apply_override(tree, override, problems)
    recipe = check_tree(tree, source, problems)
    return LoadedRecipe(recipe, file, tuple(files), tuple(overrides), tree)


def check_tree(tree: Node, source: str, problems: Sequence[Problem]) -> Recipe:
    """The recipe that a merged tree is.

    Raises:
        RecipeError: naming the `problems` that were found before, and every mistake in the tree.
    """
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        raise RecipeError(source, [*problems, *complaints(error, tree)]) from None
    if problems:
        raise RecipeError(source, problems)
    return recipe


def recipe_file(name: str) -> Path:
    """The file that `name` means: a file, else the shipped recipe of that name.

    Raises:
        RecipeError: there is neither.
    """
    problems: list[Problem] = []
    file = _resolve(name, None, name, problems)
    if file is None:
        raise RecipeError(name, problems)
    return file


def _resolve(name: str, relative_to: Path | None, place: str, problems: list[Problem]) -> Path | None:
    """The file that `name` means, or None with a problem."""
    file = relative_to / name if relative_to is not None else Path(name)
    if os.path.isfile(file):  # unlike Path.is_file it is false, and raises nothing, for a name that is too long
        return file
    found = shipped.find_recipe(name)
    if found is not None:
        return found
    if os.path.isdir(file):
        problems.append(Problem(place, f"{file} is a directory, not a recipe file"))
    else:
        names = shipped.recipe_names()
        problems.append(
            Problem(
                place,
                f"there is neither a file {file} nor a shipped recipe of that name{nearest(name, names)}; "
                f"shipped: {', '.join(names)}",
            )
        )
    return None


def read_chain(file: Path, files: list[Path], problems: list[Problem]) -> Node | None:
    """The recipe in `file` laid over what it extends; None where it cannot be read. `files` gets all of them."""
    files.append(file)
    tree = read_mapping(file, problems)
    if tree is None:
        return None
    entries = dict(tree.value)
    extends = entries.pop("extends", None)
    child = Node(entries, tree.place)
    if extends is None:
        return child
    if not isinstance(extends.value, str):
        problems.append(Problem(extends.place, "extends: expected one file or shipped recipe name"))
        return None
    parent = _resolve(extends.value, file.parent, f"{extends.place}: extends", problems)
    if parent is None:
        return None
    if any(parent.samefile(earlier) for earlier in files):
        chain = " -> ".join(str(link) for link in [*files, parent])
        problems.append(Problem(extends.place, f"extends: the recipes extend each other: {chain}"))
        return None
    base = read_chain(parent, files, problems)
    return merge(with_default_kinds(base), child) if base is not None else None


def read_mapping(file: Path, problems: list[Problem], what: str = "recipe") -> Node | None:
    """The mapping that a YAML file holds; None, with a problem, where it holds none."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        problems.append(Problem(str(file), f"cannot be read: {error.strerror}"))
        return None
    if len(raw) > _MAX_BYTES:
        problems.append(Problem(str(file), f"has more than {_MAX_BYTES:,} bytes; a {what} is a short YAML file"))
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(
            Problem(f"{file}:{line}", f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8")
        )
        return None
    tree = yaml_tree.parse(text, lambda line: f"{file}:{line}", problems)
    if tree is None:
        return None
    if tree.value is None:
        problems.append(Problem(tree.place, f"the {what} is empty"))
        return None
    if not isinstance(tree.value, dict):
        problems.append(Problem(tree.place, f"a {what} is a mapping: lines of key: value"))
        return None
    return tree
