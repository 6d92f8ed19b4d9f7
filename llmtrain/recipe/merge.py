"""How recipes build on each other: `extends`, and `key=value` overrides.

Mappings merge key by key and lists replace. A section whose `kind` becomes another replaces the whole
section, because the keys of one kind mean nothing to another.
"""

from llmtrain.recipe import yaml_tree
from llmtrain.recipe.problems import Problem
from llmtrain.recipe.schema import Recipe, Section
from llmtrain.recipe.yaml_tree import Node


def _default_kinds() -> dict[str, str]:
    """The kind of each top-level section that may leave it out."""
    kinds: dict[str, str] = {}
    for name, field in Recipe.model_fields.items():
        annotation = field.annotation
        if isinstance(field.default, Section):
            kind = field.default.model_dump().get("kind")
        elif isinstance(annotation, type) and issubclass(annotation, Section) and "kind" in annotation.model_fields:
            kind = annotation.model_fields["kind"].default
        else:
            continue
        if isinstance(kind, str):
            kinds[name] = kind
    return kinds


DEFAULT_KINDS = _default_kinds()


def with_default_kinds(root: Node) -> Node:
    """Writes out the kind of every section that left it to its default."""
    entries = dict(root.value)
    for name, kind in DEFAULT_KINDS.items():
        section = entries.get(name)
        if section is not None and isinstance(section.value, dict) and "kind" not in section.value:
            entries[name] = Node({"kind": Node(kind, section.place), **section.value}, section.place)
    return Node(entries, root.place)


def merge(parent: Node, child: Node) -> Node:
    """`child` laid over `parent`."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    if "kind" in child.value and "kind" in parent.value and _kind(child) != _kind(parent):
        return child
    merged = dict(parent.value)
    for key, value in child.value.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return Node(merged, child.place)


def apply_override(root: Node, text: str, problems: list[Problem]) -> Node:
    """`root` with one `key=value`; what is wrong with it is appended to `problems`."""
    place = f"override {text!r}"
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip():
        problems.append(Problem(place, "an override is key=value, for example optimizer.lr=3e-4"))
        return root
    value = yaml_tree.parse(value_text, lambda line: place, problems)
    if value is None:
        return root
    path = tuple(key.strip().split("."))
    if "extends" in path[:1]:
        problems.append(Problem(place, "extends is read from files only"))
        return root
    return with_default_kinds(_set(root, (), path, value.moved(place), problems))


def _set(node: Node, done: tuple[str, ...], path: tuple[str, ...], value: Node, problems: list[Problem]) -> Node:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        if not (key.isascii() and key.isdigit() and int(key) < len(node.value)):
            last = len(node.value) - 1
            held = f"its items are 0 to {last}" if last >= 0 else "it is empty"
            problems.append(Problem(value.place, f"{'.'.join(done)} is a list and has no item {key!r}; {held}"))
            return node
        items = list(node.value)
        items[int(key)] = _set(items[int(key)], (*done, key), rest, value, problems)
        return Node(items, node.place)
    if node.value is not None and not isinstance(node.value, dict):
        problems.append(
            Problem(value.place, f"{'.'.join(done)} is no section but {node.value!r}; it has no key {key!r}")
        )
        return node
    entries = dict(node.value or {})
    if key == "kind" and not rest and done and "kind" in entries and entries["kind"].value != value.value:
        return Node({"kind": value}, value.place)
    below = entries.get(key, Node(None, value.place))
    entries[key] = _set(below, (*done, key), rest, value, problems)
    return Node(entries, node.place)


def _kind(node: Node) -> object:
    return node.value["kind"].value
