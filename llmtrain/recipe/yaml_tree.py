"""YAML in which every value knows its place, read strictly.

PyYAML reads YAML 1.1, where `1e-3` is text, `no` is false, `010` is eight and `1:30` is ninety. Here
scalars follow the core schema of YAML 1.2; duplicate keys, tags and keys that are no text are problems.
So is what no recipe needs and what would eat the stack or the memory: deep nesting, aliases of aliases.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from llmtrain.recipe.problems import Problem

Path = tuple[str | int, ...]

_NULL = re.compile(r"^(?:null|Null|NULL|~|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]{1,4000}$")  # Python reads no more digits; what has more is a float, and infinite
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_CORE = "tag:yaml.org,2002:"
_SCALARS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))
_MAX_DEPTH = 50
_MAX_VALUES = 100_000  # those that an alias repeats counted each time


class _TooMuch(yaml.MarkedYAMLError):
    """Valid YAML, and no recipe."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as PyYAML declares it)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth == _MAX_DEPTH:
            event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _too_deep(event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _too_deep(mark: Any) -> _TooMuch:
    return _TooMuch(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as PyYAML declares it)

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that is used twice is written twice


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Unless it is escaped, U+0085 is read back as any line break is.
    return dumper.represent_scalar(f"{_CORE}str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _represent_text)
for _name, _pattern in _SCALARS:
    _Loader.add_implicit_resolver(_CORE + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_CORE + _name, _pattern, None)


@dataclass(frozen=True)
class Node:
    """A value with its place ("file:line", or the override it came from), which is that of its key."""

    value: Any  # a scalar, dict[str, Node] or list[Node]
    place: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> "Node | None":
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            child: Node = self.value[key]
            return child
        return None

    def find(self, path: Path) -> "Node | None":
        """The node at `path`, or None."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def place_of(self, path: Path) -> str:
        """The place of `path`, or of the deepest section above it that is written somewhere."""
        node: Node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node.place

    def moved(self, place: str) -> "Node":
        return replace(self, place=place)


def parse(text: str, place_at: Callable[[int], str], problems: list[Problem]) -> Node | None:
    """Reads one YAML document.

    Args:
        text: the document.
        place_at: names the place of a line, counted from one.
        problems: mistakes are appended here; after a syntax error the result is None.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return Node(None, place_at(1))
        return _Converter(place_at, problems).convert(root, place_at(root.start_mark.line + 1))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(Problem(place_at(mark.line + 1 if mark else 1), _syntax_message(error)))
        return None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.append(Problem(place_at(line), f"character {error.character!r} is not allowed in YAML"))
        return None


def dump(value: Any) -> str:
    """YAML that `parse` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "syntax error"
    if isinstance(error, _TooMuch):
        return problem
    if "'\\t'" in problem:
        return "not valid YAML: a tab; indent with spaces"
    if "alias" in f"{problem} {error.context}":
        return f"not valid YAML: {problem}; put text that begins with * in quotes"
    if isinstance(error, yaml.composer.ComposerError) and "single document" in (error.context or ""):
        return "a second YAML document begins here; a recipe is one"
    return f"not valid YAML: {problem}" + (f" ({error.context})" if error.context and error.problem else "")


class _Converter:
    def __init__(self, place_at: Callable[[int], str], problems: list[Problem]):
        self.place_at, self.problems = place_at, problems
        self.active: set[int] = set()  # nodes that are being converted: an alias to one of them is a loop
        self.num_values = 0

    def convert(self, node: yaml.Node, place: str) -> Node:
        if id(node) in self.active:
            self.problems.append(Problem(place, "an alias that contains itself"))
            return Node(None, place)
        self.num_values += 1
        if self.num_values > _MAX_VALUES:
            message = f"more than {_MAX_VALUES:,} values, those that aliases (*) repeat counted each time"
            raise _TooMuch(problem=message, problem_mark=node.start_mark)
        if len(self.active) == _MAX_DEPTH:  # by aliases, or it would not have been composed
            raise _too_deep(node.start_mark)
        self.active.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
                return Node(self._mapping(node), place)
            if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
                items = [self.convert(item, self.place_at(item.start_mark.line + 1)) for item in node.value]
                return Node(items, place)
            return Node(self._scalar(node), place)
        finally:
            self.active.remove(id(node))

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.place_at(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _CORE + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "that is a list or a mapping"
                self.problems.append(Problem(place, f"key {shown} is no text; write it in quotes if it is meant"))
                continue
            key = key_node.value
            if key in entries:
                self.problems.append(Problem(place, f"key {key!r} is given twice; first at {entries[key].place}"))
                continue
            entries[key] = self.convert(value_node, place)
        return entries

    def _scalar(self, node: yaml.Node) -> Any:
        text = node.value
        place = self.place_at(node.start_mark.line + 1)
        if node.tag == _CORE + "str":
            return self._text(text, place)
        if node.tag == _CORE + "null" and _NULL.match(text):
            return None
        if node.tag == _CORE + "bool" and _BOOL.match(text):
            return text.lower() == "true"
        if node.tag == _CORE + "int" and _INT.match(text):
            return int(text)
        if node.tag == _CORE + "float" and _FLOAT.match(text):
            return float(re.sub(r"\.(?=[iInN])", "", text))
        self.problems.append(Problem(place, f"YAML tag {node.tag} does not fit here; write the plain value"))
        return None

    def _text(self, text: str, place: str) -> str:
        """Text that UTF-8 and file names can hold."""
        # JSON escapes a character beyond U+FFFF as two surrogates, which PyYAML does not join.
        units = text.encode("utf-16", "surrogatepass")
        try:
            text = units.decode("utf-16")
        except UnicodeDecodeError:
            self.problems.append(Problem(place, "half of a surrogate pair in a text; write both halves, or neither"))
            text = units.decode("utf-16", "replace")
        if "\0" in text:
            self.problems.append(Problem(place, "a NUL character in a text; remove it"))
        return text
