"""Records of answers that were judged: compared, ranked, labelled as wholes or step by step."""

from typing import Any

from llmtrain.data.conversations import (
    Message,
    a_type,
    check_answered,
    check_asks,
    check_order,
    non_blank,
    parse_messages,
    parse_tools,
)
from llmtrain.data.examples import Example, Labelled, Preference, Ranking, Stepwise
from llmtrain.errors import InputError

STEPWISE = '{"prompt": "...", "completions": ["step 1", "step 2"], "labels": [true, false]}'
RANKING = '{"prompt": "...", "completions": ["good", "better"], "ranks": [2, 1]}'

MOST_RANK = 1_000_000  # which float32 tells from its neighbours
MOST_MARGIN = 1e6


def parse_preference(fields: dict[str, Any], where: str) -> Example:
    names = [name for name in ("prompt", "chosen", "rejected") if name in fields]
    check_same_kind({name: fields[name] for name in names}, where)
    prompt = None if "prompt" not in fields else _prompt(fields["prompt"], where)
    chosen, rejected = (_answer(fields[name], name, prompt, where) for name in ("chosen", "rejected"))
    return Preference(prompt, chosen, rejected, where, parse_tools(fields.get("tools"), where), _margin(fields, where))


def _margin(fields: dict[str, Any], where: str) -> float:
    margin = fields.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= MOST_MARGIN:  # NaN is none
        remedy = "write how far apart the scores shall be, or leave it out"
        message = f"margin is {margin!r:.40}, not a number from {-MOST_MARGIN:g} to {MOST_MARGIN:g}"
        raise InputError(message, where=where, remedy=remedy)
    return float(margin)


def parse_ranking(fields: dict[str, Any], where: str) -> Example:
    completions, ranks = _lists(fields, ("completions", "ranks"), RANKING, where)
    for index, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
            remedy = "1 is the best; answers that were not told apart share a rank"
            message = f"ranks[{index}] is {rank!r:.40}, not a whole number from 1 to {MOST_RANK:,}"
            raise InputError(message, where=where, remedy=remedy)
    given = {"prompt": fields["prompt"]} if "prompt" in fields else {}
    answers = {f"completions[{index}]": answer for index, answer in enumerate(completions)}
    check_same_kind(given | answers, where)
    prompt = _prompt(fields["prompt"], where) if given else None
    parsed: list[Any] = [_answer(answer, name, prompt, where) for name, answer in answers.items()]
    return Ranking(prompt, parsed, list(ranks), where, parse_tools(fields.get("tools"), where))


def parse_labelled(fields: dict[str, Any], where: str) -> Example:
    check_same_kind({name: fields[name] for name in ("prompt", "completion")}, where)
    label = fields["label"]
    if not isinstance(label, bool):
        remedy = "write true for a good answer, false for a bad one"
        raise InputError(f"label is {a_type(label)} ({label!r}), not true or false", where=where, remedy=remedy)
    prompt = _prompt(fields["prompt"], where)
    completion = _answer(fields["completion"], "completion", prompt, where)
    return Labelled(prompt, completion, label, where, parse_tools(fields.get("tools"), where))


def parse_stepwise(fields: dict[str, Any], where: str) -> Example:
    prompt = _prompt(fields["prompt"], where)
    completions, labels = _lists(fields, ("completions", "labels"), STEPWISE, where)
    steps = [non_blank(step, f"completions[{i}]", where, f"expected: {STEPWISE}") for i, step in enumerate(completions)]
    for index, label in enumerate(labels):
        if not isinstance(label, bool):
            message = f"labels[{index}] is {a_type(label)} ({label!r}), not true or false"
            raise InputError(message, where=where, remedy=f"expected: {STEPWISE}")
    return Stepwise(prompt, steps, labels, where)


def _lists(fields: dict[str, Any], names: tuple[str, str], example: str, where: str) -> tuple[list[Any], list[Any]]:
    """Two fields that are arrays of one length, at least 1."""
    first, second = (fields[name] for name in names)
    for name, value in zip(names, (first, second), strict=True):
        if not isinstance(value, list):
            raise InputError(f"{name} is {a_type(value)}, not an array", where=where, remedy=f"expected: {example}")
    if not first or len(first) != len(second):
        message = f"{len(first)} {names[0]} with {len(second)} {names[1]}; each has one"
        raise InputError(message, where=where, remedy=f"expected: {example}")
    return first, second


def _prompt(prompt: Any, where: str) -> str | list[Message]:
    if isinstance(prompt, list):
        return prompt_messages(prompt, where)
    return non_blank(prompt, "prompt", where, "write it, or leave the record out")


def _answer(answer: Any, name: str, prompt: Any, where: str) -> Any:
    """A string, or messages that end with the assistant's; those of the prompt come before them."""
    if not isinstance(answer, list):
        return non_blank(answer, name, where, "write it, or leave the record out")
    messages = parse_messages(answer, name, where)
    check_answered(messages, name, where)
    check_order(messages, name, where, after=prompt[-1]["role"] if prompt else None)
    return messages


def prompt_messages(prompt: Any, where: str) -> list[Message]:
    """A prompt of messages that waits for an answer."""
    messages = parse_messages(prompt, "prompt", where)
    check_order(messages, "prompt", where)
    check_asks(messages, "prompt", where)
    return messages


def check_same_kind(values: dict[str, Any], where: str) -> None:
    """Raises InputError where some of the fields are strings and others are messages."""
    kinds = {name: "messages" if isinstance(value, list) else "a string" for name, value in values.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise InputError(told, where=where, remedy="make all of them strings, or all of them lists of messages")
