import pytest

from llmtrain.evaluation.templates import fields_of, fill


def test_fields_are_filled_in_and_nothing_is_run() -> None:
    template = "{a} {{a}} {b.c} }}"
    assert fields_of(template) == ["a", "b.c"]
    assert fill(template, {"a": "{b}", "b.c": 2}) == "{b} {a} 2 }"
    assert fields_of("no fields") == []


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{a"])
def test_brackets_that_stand_alone(template: str) -> None:
    with pytest.raises(ValueError, match="write {field}, and {{ for a bracket"):
        fields_of(template)
