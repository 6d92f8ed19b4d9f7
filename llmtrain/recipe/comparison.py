"""A comparison: one recipe in several variants, trained one after another and measured on the same texts.

    name, description, sequence_length, ...     a recipe as any other, `extends` included
    variants:                                   what each variant lays over it
      masked:
        algorithm: {kind: masked_diffusion}
      adapted:
        start_from: ar                          begin with the weights that another variant ended with
        algorithm: {kind: masked_diffusion, shift: true}
    compare: {documents: 200}                   how they are measured

The runs go to output_dir/name/variant.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from llmtrain.recipe.complaints import complaints
from llmtrain.recipe.loading import LoadedRecipe, check_tree, read_chain, recipe_file
from llmtrain.recipe.merge import apply_override, merge, with_default_kinds
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import Data, Recipe, Section
from llmtrain.recipe.schema.base import PositiveInt
from llmtrain.recipe.yaml_tree import Node

VARIANTS, COMPARE, START_FROM = "variants", "compare", "start_from"


class Measurement(Section):
    """How the variants are measured: on documents that none was trained on."""

    documents: PositiveInt = Field(200, description="Held-out documents, the first ones; all where there are fewer.")
    samples: PositiveInt = Field(4, description="Draws of noise on each, for bounds that are estimated.")


@dataclass(frozen=True)
class LoadedComparison:
    """A checked comparison.

    Attributes:
        variants: recipe of each, in the order of the file.
        start_from: of some variants, the one that they begin with the weights of.
        measurement: how they are measured.
        directory: where the runs and the result go.
        file: it came from.
    """

    name: str
    description: str
    variants: dict[str, LoadedRecipe]
    start_from: dict[str, str]
    measurement: Measurement
    directory: Path
    file: Path


def is_comparison(path: str | os.PathLike[str]) -> bool:
    """Whether a YAML file, or the shipped one of that name, has variants; False of one that cannot be read."""
    tree = read_chain(recipe_file(os.fspath(path)), [], [])
    return tree is not None and VARIANTS in tree.value


def load_comparison(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedComparison:
    """Reads and checks a comparison, every variant of it.

    Args:
        path: a YAML file, or the name of a shipped one such as diffusion/compare.
        overrides: `dotted.key=value` texts, laid over every variant; those of `variants` and `compare` over the file.

    Raises:
        RecipeError: naming every mistake, each with file and line or override.
    """
    source = os.fspath(path)
    file, problems, files = recipe_file(source), list[Problem](), list[Path]()
    tree = read_chain(file, files, problems)
    if tree is None:
        raise RecipeError(source, problems)
    if VARIANTS not in tree.value:
        raise RecipeError(source, [Problem(tree.place, "it has no variants: train it with `llmtrain train`")])
    own = [override for override in overrides if re.split(r"[.=]", override)[0] in (VARIANTS, COMPARE)]
    overrides = [override for override in overrides if override not in own]
    for override in own:
        tree = apply_override(tree, override, problems)
    entries = dict(tree.value)
    variants, compare = entries.pop(VARIANTS), entries.pop(COMPARE, Node({}, tree.place))
    base = with_default_kinds(Node(entries, tree.place))
    if not isinstance(variants.value, dict) or not variants.value:
        raise RecipeError(source, [Problem(variants.place, f"{VARIANTS} is a mapping of names to what each changes")])
    measurement = _measurement(compare, problems)
    loaded: dict[str, LoadedRecipe] = {}
    starts: dict[str, str] = {}
    names = list(variants.value)
    for number, (name, layer) in enumerate(variants.value.items()):
        try:
            tree = _variant_tree(name, layer, base, overrides, names[:number], starts)
            recipe = check_tree(tree, source, [])
            loaded[name] = LoadedRecipe(recipe, file, tuple(files), tuple(overrides), tree)
            problems += _unmeasurable(name, recipe, next(iter(loaded.values())).recipe, layer.place)
        except RecipeError as error:
            problems += error.problems
    if problems or measurement is None:
        raise RecipeError(source, list(dict.fromkeys(problems)))
    first = next(iter(loaded.values())).recipe
    directory = Path(first.output_dir).expanduser()
    return LoadedComparison(directory.name, first.description, loaded, starts, measurement, directory, file)


def _unmeasurable(name: str, recipe: Recipe, first: Recipe, place: str) -> list[Problem]:
    """Why a variant could not be measured on the texts that the first one holds out; told before all are trained."""
    data = recipe.data
    if recipe.fine_tunes:
        what = "trains on examples, and a comparison measures texts: algorithms and tasks of pretraining"
    elif data.validation is None and data.validation_fraction == 0:
        what = "holds out no texts to measure on; give data.validation or data.validation_fraction"
    elif _held_out(data) != _held_out(first.data):
        what = "holds out other texts than the first variant, and all are measured on the same"
    else:
        return []
    return [Problem(place, f"{VARIANTS}.{name} {what}")]


def _held_out(data: Data) -> tuple[list[dict[str, Any]], float]:
    sources, fraction = (data.train, data.validation_fraction) if data.validation is None else (data.validation, 0.0)
    return [source.model_dump(exclude={"weight"}) for source in sources], fraction


def _measurement(node: Node, problems: list[Problem]) -> Measurement | None:
    try:
        return Measurement.model_validate(node.plain())
    except ValidationError as error:
        problems += complaints(error, node, Measurement)
        return None


def _variant_tree(
    name: str,
    layer: Node,
    base: Node,
    overrides: Sequence[str],
    above: Sequence[str],
    starts: dict[str, str],
) -> Node:
    """The recipe of a variant; where it starts from another one, that is added to `starts`."""
    if not isinstance(layer.value, dict | None):
        raise RecipeError(name, [Problem(layer.place, f"{VARIANTS}.{name} is a mapping of what it changes")])
    entries, place = dict(layer.value or {}), layer.place
    start = entries.pop(START_FROM, None)
    problems = [
        Problem(entries[key].place, f"{key} is the comparison's") for key in ("name", "output_dir") if key in entries
    ]
    tree = merge(base, Node(entries, place))
    for override in overrides:
        tree = apply_override(tree, override, problems)
    comparison, output = tree.child("name"), tree.child("output_dir")
    directory = Path("runs" if output is None else str(output.value), str(comparison.value if comparison else ""))
    own = {"name": Node(name, place), "output_dir": Node(str(directory), place)}
    if start is not None and start.value in above:
        starts[name] = start.value
        final = directory / start.value / "final"
        own["model"] = Node({"kind": Node("pretrained", place), "path": Node(str(final), place)}, place)
        own["tokenizer"] = Node({"kind": Node("model", place)}, place)
    elif start is not None:
        known = ", ".join(above) or "there is none"
        problems.append(Problem(start.place, f"{START_FROM}: {start.value!r} is no variant above it ({known})"))
    if problems:
        raise RecipeError(name, problems)
    return Node({**tree.value, **own}, tree.place)
