"""pydantic's errors, said so that the person who wrote the recipe can act on them.

Each becomes one line: the place, the key, what is wrong, what is allowed, the value that was given.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmtrain.errors import nearest
from llmtrain.recipe.introspect import alternatives, below, dotted_keys, kind_of, kinds, literals, section_class, strip
from llmtrain.recipe.problems import Problem
from llmtrain.recipe.schema import Recipe, Section
from llmtrain.recipe.yaml_tree import Node, Path

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section of key: value lines",
    "model_type": "a section of key: value lines",
    "model_attributes_type": "a section of key: value lines",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def complaints(error: ValidationError, root: Node, schema: Any = Recipe) -> list[Problem]:
    """One problem for each of pydantic's errors, in its order.

    Args:
        root: what was checked, with places.
        schema: the section, or union of kinds, that it was checked against.
    """
    groups: dict[Path, list[dict[str, Any]]] = {}
    for entry in error.errors(include_url=False):
        *_, choice = _locate(entry["loc"], schema)
        groups.setdefault(entry["loc"] if choice is None else choice, []).append(dict(entry))
    problems: list[Problem] = []
    for place, entries in groups.items():
        # of a value that may be of several types each type complains: the one that looked into it was meant
        deepest = max(len(entry["loc"]) for entry in entries)
        if len(entries) > 1 and deepest == len(place) + 1:
            problems.append(_of_no_type(entries, root, schema))
        else:
            problems += [_complaint(entry, root, schema) for entry in entries if len(entry["loc"]) == deepest]
    return problems


def _of_no_type(entries: list[dict[str, Any]], root: Node, schema: Any) -> Problem:
    """About a value that is of none of the types that it may have."""
    given = entries[0]["input"]
    expected = " or ".join(_EXPECTED[entry["type"]] for entry in entries if entry["type"] != "literal_error")
    message = f"expected {expected}, given {_shown(given)}"
    for entry in entries:
        path, _, annotation, _ = _locate(entry["loc"], schema)
        if entry["type"] == "literal_error":
            message = f"{_not_among(given, literals(annotation))}, or {expected}"
    return _problem(root, path, path, message)


def _complaint(entry: Mapping[str, Any], root: Node, schema: Any) -> Problem:
    path, parent, annotation, _ = _locate(entry["loc"], schema)
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "value_error":
        mentioned = _mentioned(str(context["error"]), path, root)
        return _problem(root, mentioned, path, str(context["error"]))
    if kind == "missing":
        return _problem(root, path, path[:-1], f"missing key {path[-1]!r}{_meaning(parent, path[-1])}")
    if kind == "extra_forbidden":
        return _problem(root, path, path, _unknown_key(str(path[-1]), path, parent, schema))
    if kind == "union_tag_not_found":
        return _problem(root, path, path, f"missing key 'kind'; allowed: {', '.join(kinds(annotation))}")
    if kind == "union_tag_invalid":
        path = (*path, "kind")
        node = root.find(path)
        return _problem(root, path, path, _not_among(node.value if node else None, tuple(kinds(annotation))))
    return _problem(root, path, path, _wrong_value(kind, context, entry["input"], annotation))


def _problem(root: Node, place: Path, key: Path, message: str) -> Problem:
    """A problem at the place of `place`, about `key`."""
    dotted = ".".join(str(part) for part in key)
    return Problem(root.place_of(place), f"{dotted}: {message}" if dotted else message)


def _locate(loc: tuple[str | int, ...], schema: Any) -> tuple[Path, Any, Any, Path | None]:
    """(path without the tags of unions, annotation of the section that holds it, its own annotation, and where pydantic
    chose from several types, its own path to there)."""
    path: list[str | int] = []
    parent: Any = None
    annotation = schema
    choice: Path | None = None
    for place, part in enumerate(loc):
        members, types = kinds(annotation), alternatives(annotation)
        if members:
            annotation = members[str(part)]
        elif types:
            annotation, choice = types[str(part).split("[")[0]], loc[:place]
        else:
            path.append(part)
            parent, annotation = annotation, below(annotation, part)
    return tuple(path), parent, annotation, choice


def _mentioned(message: str, section: Path, root: Node) -> Path:
    """The key within `section` that a message is about, to point at: an override's before a file's."""
    names = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message)
    paths = [(*section, *name.split(".")) for name in names]
    written = [path for path in paths if root.find(path) is not None]
    overridden = [path for path in written if root.place_of(path).startswith("override")]
    return (overridden or written or [section])[0]


def _meaning(parent: Any, name: str | int) -> str:
    """What a missing key would say, in brackets."""
    section = section_class(parent)
    assert section is not None, "only sections require keys"
    field = section.model_fields[str(name)]
    single = section_class(field.annotation)
    if field.description:
        meaning = field.description.rstrip(".")
    elif single is not None:
        meaning = (single.__doc__ or "").split(";")[0].rstrip(".")
    else:
        meaning = f"kind {', '.join(kinds(field.annotation))}"
    return f" ({meaning})"


def _unknown_key(name: str, path: Path, parent: Any, schema: Any) -> str:
    section = section_class(parent)
    assert section is not None, "only sections forbid keys"
    allowed = sorted(section.model_fields, key=lambda key: key != "kind")  # the kind decides on the others
    of_kind = f" for kind {kind_of(section)}" if "kind" in allowed else ""
    return f"unknown key {name!r}{of_kind}{_elsewhere(name, path, allowed, schema)}; allowed: {', '.join(allowed)}"


def _elsewhere(name: str, path: Path, allowed: list[str], schema: Any) -> str:
    """Where an unknown key may have been meant to go: another kind, a similar name, another section."""
    siblings = [kind for kind, section in _siblings(path, schema).items() if name in section.model_fields]
    if siblings:
        return f"; {'kinds' if len(siblings) > 1 else 'kind'} {', '.join(siblings)} would take it"
    hint = nearest(name, allowed)
    if hint:
        return hint
    roots = kinds(schema).values() or [schema]
    dotted = dict.fromkeys(key for root in roots for key in dotted_keys(root))
    others = [key for key in dotted if key.split(".")[-1] == name]
    return f"; there is {' and '.join(others[:2])}" if others else ""


def _siblings(path: Path, schema: Any) -> dict[str, type[Section]]:
    """The kinds that the section above `path` comes in."""
    annotation = schema
    for part in path[:-1]:
        annotation = below(annotation, part)
    return kinds(annotation)


def _not_among(given: Any, allowed: tuple[Any, ...]) -> str:
    names = [str(value) for value in allowed]
    hint = nearest(given, names) if isinstance(given, str) else ""
    return f"{_shown(given)} is not allowed{hint}; allowed: {', '.join(names)}"


def _wrong_value(kind: str, context: Mapping[str, Any], given: Any, annotation: Any) -> str:
    if kind == "literal_error":
        return _not_among(given, literals(annotation))
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}, given {_shown(given)}"
    if kind in ("too_short", "too_long"):
        word, length = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        num = context[length]
        return f"must have {word} {num} item{'s' if num > 1 else ''}, given {context['actual_length']}"
    if kind in ("string_too_short", "string_too_long"):
        word, length = ("at least", "min_length") if kind == "string_too_short" else ("at most", "max_length")
        num = context[length]
        return f"must have {word} {num} character{'s' if num > 1 else ''}, given {len(given)}"
    if kind == "string_pattern_mismatch":
        return f"may hold letters, digits, '.', '_' and '-' and begins with a letter or digit, given {_shown(given)}"
    expected = _EXPECTED[kind]
    hint = ""
    if expected == "text" and isinstance(given, (bool, int, float)):
        hint = "; put it in quotes"
    elif kind.startswith("int") and isinstance(given, float) and given.is_integer():
        hint = f"; write {int(given)}"
    elif strip(annotation) in (int, float) and isinstance(given, str) and _is_number(given):
        hint = "; write it as plain digits, without quotes or separators"
    return f"expected {expected}, given {_shown(given)}{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    """A value in the recipe's terms, with the type where it cannot be seen."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    if isinstance(value, dict):
        return "a section" + (f" with {', '.join(list(value)[:5])}" if value else " without keys")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)
