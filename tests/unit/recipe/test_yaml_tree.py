import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.recipe.problems import Problem
from llmtrain.recipe.yaml_tree import Node, dump, parse


def read(text: str) -> tuple[Any, list[str]]:
    problems: list[Problem] = []
    node = parse(text, lambda line: f"f:{line}", problems)
    return (node.plain() if node is not None else None), [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # text in YAML 1.1
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("-0.", 0.0),
        ("010", 10),  # eight in YAML 1.1
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'1'", "1"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("=", "="),
        ('"\\ud83d\\ude00"', "😀"),  # as JSON escapes it
        ("9" * 4001, math.inf),  # Python refuses to read it as an integer
        ("[1, [2]]", [1, [2]]),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert read(f"a: {text}") == ({"a": value}, [])


def test_nan() -> None:
    assert math.isnan(read("a: .NaN")[0]["a"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "f:3: key 'a' is given twice; first at f:1"),
        ("a:\n  b: 1\n  b: 2", "f:3: key 'b' is given twice; first at f:2"),
        ("a: 1\n2: b", "f:2: key 2 is no text; write it in quotes if it is meant"),
        ("true: b", "f:1: key true is no text; write it in quotes if it is meant"),
        ("[a, b]: c", "f:1: key that is a list or a mapping is no text; write it in quotes if it is meant"),
        ("a: !!python/name:os.system x", "f:1: YAML tag tag:yaml.org,2002:python/name:os.system does not fit here"),
        ("a: !!int x", "f:1: YAML tag tag:yaml.org,2002:int does not fit here"),
        ("a: !mine {b: 1}", "f:1: YAML tag !mine does not fit here"),
        ("a: &x [1, *x]", "f:1: an alias that contains itself"),
        ("a: [1", "f:1: not valid YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2", "f:2: not valid YAML: a tab; indent with spaces"),
        ("a: 1\nb: *x", "f:2: not valid YAML: found undefined alias 'x'; put text that begins with * in quotes"),
        ("a: **/*.txt", "f:1: not valid YAML: expected alphabetic or numeric character"),
        ("a: 1\n---\nb: 2", "f:2: a second YAML document begins here; a recipe is one"),
        ("a: 1\nb: \x01", "f:2: character 1 is not allowed in YAML"),
        ("a: @b", "f:1: not valid YAML: found character '@' that cannot start any token"),
        ("a: b: c", "f:1: not valid YAML: mapping values are not allowed here"),
        ('a: 1\nb: "\\ud83d x"', "f:2: half of a surrogate pair in a text"),
        ('a: 1\nb: "\\0"', "f:2: a NUL character in a text"),
        ("a:\n  " + "[" * 5000, "f:2: nested more than 50 deep"),
        ("".join(" " * depth + "a:\n" for depth in range(2000)), "f:50: nested more than 50 deep"),
    ],
)
def test_problems_name_the_line(text: str, problem: str) -> None:
    _, problems = read(text)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def aliases(num: int, repeats: int) -> str:
    """Each list holds the one before it, `repeats` times."""
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * repeats)}]\n" for n in range(1, num)]
    return "".join(["a0: &a0 [x]\n", *lines])


def test_aliases_do_not_multiply() -> None:
    assert read(aliases(3, repeats=2)) == ({"a0": ["x"], "a1": [["x"]] * 2, "a2": [[["x"]] * 2] * 2}, [])
    _, (problem,) = read(aliases(30, repeats=10))  # would be 10^29 values
    assert "more than 100,000 values" in problem
    _, (problem,) = read(aliases(2000, repeats=1))
    assert "nested more than 50 deep" in problem


def test_all_problems_are_collected() -> None:
    value, problems = read("a: 1\na: 2\nb: {c: 1, c: 2}\n3: d\n")
    assert [problem.split(":")[1] for problem in problems] == ["2", "3", "4"]
    assert value == {"a": 1, "b": {"c": 1}}


def test_places() -> None:
    node = parse("a:\n  b:\n    - 1\n    - c: 2\n", lambda line: f"f:{line}", [])
    assert isinstance(node, Node)
    assert node.place_of(("a",)) == "f:1"
    assert node.place_of(("a", "b")) == "f:2"
    assert node.place_of(("a", "b", 1, "c")) == "f:4"
    assert node.place_of(("a", "missing", "deeper")) == "f:1"
    assert node.find(("a", "b", 5)) is None
    assert node.find(("a", "b", 0, "no section")) is None


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts


@given(
    st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("abcyn.:1-"), inner), max_leaves=9)
)
def test_dump_reads_back(value: Any) -> None:
    """Also text that looks like a number, a boolean of YAML 1.1, or a date."""
    assert read(dump({"value": value})) == ({"value": value}, [])


@pytest.mark.parametrize(
    "text", ["1e-3", "yes", "null", "010", "1:30", "2024-01-01", "", " a", "a: b", "# a", "=", "<<", "a\x85b"]
)
def test_dump_quotes_what_needs_it(text: str) -> None:
    assert read(dump({"value": text})) == ({"value": text}, [])


def test_dump_writes_shared_values_twice() -> None:
    shared = ["a"]
    assert "&" not in dump({"one": shared, "two": shared})
