"""Rows as prompts: templates or messages, worked examples before them, plain or in the chat template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.data.records import Record
from llmtrain.errors import InputError, nearest
from llmtrain.evaluation.tasks import LoadedTask, Prompted
from llmtrain.evaluation.templates import fields_of, fill
from llmtrain.models.saved import Saved
from llmtrain.sampling.prompts import check_chat_template, check_messages, encode_messages, encode_text
from llmtrain.sampling.rows import read_rows

Target = Callable[[Record], str]
"""What comes after the prompt of an example."""


@dataclass(frozen=True)
class Asked:
    """A row as it is asked: token ids, and the text or messages that they stand for."""

    ids: list[int]
    shown: str | list[Any]


def check_all_fit(
    saved: Saved, rows: Sequence[Record], lengths: Sequence[int], fits: Sequence[bool], what: str
) -> None:
    """Raises InputError where a row's tokens, `lengths`, do not fit the model; `what` they are is said."""
    long = [index for index, does in enumerate(fits) if not does]
    if long:
        raise InputError(
            f"{len(long)} of {len(rows)} {what} do not fit the model's window of {saved.window} tokens; "
            f"this one has {lengths[long[0]]}",
            where=rows[long[0]].where,
            remedy="take these rows out, or give fewer few-shot examples",
        )


def read_examples(loaded: LoadedTask, task: Prompted) -> list[Record]:
    """The worked examples of a task.

    Raises:
        InputError: the file is wrong, or has fewer.
    """
    if task.fewshot is None:
        return []
    with loaded.errors_located("fewshot.data"):
        rows = read_rows(loaded.beside(task.fewshot.data), loaded.where("fewshot.data"))
    if len(rows) < task.fewshot.num:
        raise InputError(
            f"{task.fewshot.num} examples, and {task.fewshot.data} has {len(rows)}",
            where=loaded.where("fewshot.num"),
            remedy=f"use {len(rows)} or fewer",
        )
    return rows[: task.fewshot.num]


def ask_about(
    loaded: LoadedTask, task: Prompted, saved: Saved, row: Record, examples: Sequence[Record], target: Target
) -> Asked:
    """The row's prompt, after the examples with their targets.

    Raises:
        InputError: a row, or the tokenizer's chat template, does not fit.
    """
    examples = [example for example in examples if example.fields != row.fields]  # or it would be told its own answer
    if task.messages is None and not task.chat:
        texts = [_prompt(loaded, task, example) + target(example) for example in examples]
        text = task.separator.join([*texts, _prompt(loaded, task, row)])
        return Asked(encode_text(saved.tokenizer, text, row.where), text)
    messages = [{"role": "system", "content": task.system}] if task.system is not None else []
    for example in examples:
        messages += _conversation(loaded, task, example, target)
    messages += _conversation(loaded, task, row, None)
    check_chat_template(saved, loaded.where("messages" if task.messages else "chat"), "ask by prompt, without chat")
    check_messages(messages, row.where)
    return Asked(encode_messages(saved.tokenizer, messages, row.where), messages)


def _conversation(loaded: LoadedTask, task: Prompted, row: Record, target: Target | None) -> list[Any]:
    if task.messages is not None:
        messages = field_of(loaded, row, task.messages, "messages")
        if not isinstance(messages, list) or not messages:
            raise InputError(
                f"field {task.messages!r} is no list of messages", where=row.where, remedy="name another field"
            )
        if target is not None:
            return messages
        last = messages[-1]
        return messages[:-1] if isinstance(last, dict) and last.get("role") == "assistant" else messages
    asked = [{"role": "user", "content": _prompt(loaded, task, row)}]
    return asked if target is None else [*asked, {"role": "assistant", "content": target(row).strip()}]


def _prompt(loaded: LoadedTask, task: Prompted, row: Record) -> str:
    assert task.prompt is not None
    return filled(loaded, row, task.prompt, "prompt")


def filled(loaded: LoadedTask, row: Record, template: str, key: str) -> str:
    """The template with the row's fields; `key` of the task holds it."""
    for name in fields_of(template):
        field_of(loaded, row, name, key)
    return fill(template, row.fields)


def field_of(loaded: LoadedTask, row: Record, name: str, key: str) -> Any:
    """A field of a row, which `key` of the task names.

    Raises:
        InputError: the row has none of this name.
    """
    if name not in row.fields:
        raise InputError(
            f"no field {name!r}; fields there: {', '.join(row.fields)}{nearest(name, row.fields)}",
            where=row.where,
            remedy=f"add it to the row, or name another at {loaded.where(key)}",
        )
    return row.fields[name]
