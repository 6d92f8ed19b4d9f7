"""Reading the schema itself: which kinds a section comes in, and which keys it has."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llmtrain.recipe.schema import Section


def strip(annotation: Any) -> Any:
    """`annotation` without Annotated and without "or None"."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
            continue
        if get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) == 1:
                annotation = members[0]
                continue
        return annotation


def section_class(annotation: Any) -> type[Section] | None:
    """The section that `annotation` is, where it is one and not a union of kinds."""
    annotation = strip(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def kinds(annotation: Any) -> dict[str, type[Section]]:
    """The sections of a union by their `kind`; empty where `annotation` is no such union."""
    annotation = strip(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return {}
    members = [section_class(member) for member in get_args(annotation)]
    return {kind_of(member): member for member in members if member is not None}


def alternatives(annotation: Any) -> dict[str, Any]:
    """The types of a union that is none of kinds, by pydantic's name for them up to its bracket: str, list, literal."""
    annotation = strip(annotation)
    if get_origin(annotation) not in (Union, types.UnionType) or kinds(annotation):
        return {}
    members = [strip(member) for member in get_args(annotation) if member is not type(None)]
    return {
        (get_origin(member) or member).__name__ if get_origin(member) is not Literal else "literal": member
        for member in members
    }


def kind_of(section: type[Section]) -> str:
    """The one value of the section's `kind`."""
    value: str = get_args(section.model_fields["kind"].annotation)[0]
    return value


def below(annotation: Any, key: str | int) -> Any:
    """The annotation of `key` within a section, list or mapping; None where there is no such key."""
    section = section_class(annotation)
    if section is not None:
        field = section.model_fields.get(str(key))
        return field.annotation if field is not None else None
    arguments = get_args(strip(annotation))
    return arguments[-1] if arguments else None


def literals(annotation: Any) -> tuple[str, ...]:
    """The allowed values of a Literal; empty where `annotation` is none."""
    annotation = strip(annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key below `section`, dotted; those of all kinds, list items as <index>."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        annotation = strip(field.annotation)
        if get_origin(annotation) is list:
            annotation, path = strip(get_args(annotation)[0]), f"{path}.<index>"
        single = section_class(annotation)
        for member in [single] if single is not None else kinds(annotation).values():
            yield from dotted_keys(member, f"{path}.")
