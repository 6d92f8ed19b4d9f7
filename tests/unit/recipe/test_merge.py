from llmtrain.recipe.merge import DEFAULT_KINDS, merge, with_default_kinds
from llmtrain.recipe.yaml_tree import Node, parse


def node(text: str) -> Node:
    parsed = parse(text, lambda line: f"f:{line}", [])
    assert parsed is not None
    return parsed


def test_default_kinds_are_those_of_the_schema() -> None:
    assert DEFAULT_KINDS == {"tokenizer": "model", "optimizer": "adamw", "engine": "auto"}


def test_default_kinds_are_written_out_and_nothing_else() -> None:
    written = with_default_kinds(node("engine: {compile: true}\noptimizer: 3\nseed: 1"))
    assert written.plain() == {"engine": {"kind": "auto", "compile": True}, "optimizer": 3, "seed": 1}
    assert written.place_of(("engine", "kind")) == "f:1"


def test_merge() -> None:
    def merged(parent: str, child: str) -> object:
        return merge(node(parent), node(child)).plain()

    assert merged("{a: {b: 1, c: 2}, d: [1, 2]}", "{a: {c: 3}, d: [4]}") == {"a": {"b": 1, "c": 3}, "d": [4]}
    assert merged("{a: {b: 1}}", "{a: null}") == {"a": None}
    assert merged("{a: null}", "{a: {b: 1}}") == {"a": {"b": 1}}
    assert merged("{a: {kind: x, b: 1}}", "{a: {kind: y}}") == {"a": {"kind": "y"}}
    assert merged("{a: {kind: x, b: 1}}", "{a: {kind: x}}") == {"a": {"kind": "x", "b": 1}}
    assert merged("{a: {kind: x, b: 1}}", "{a: {c: 2}}") == {"a": {"kind": "x", "b": 1, "c": 2}}
