"""From records to examples: which format a source has, and whether each record is a good one of it.

    text               text
    messages           messages [, tools]                      roles system, user, assistant, tool
    sharegpt           conversations [, system, tools]         from human, gpt, system, function_call, observation
    alpaca             instruction, output [, input, system, history]
    prompt_completion  prompt, completion [, tools]            both strings, or both lists of messages
    preference         chosen, rejected [, prompt, margin, tools]  all strings, or all lists of messages
    ranking            completions, ranks [, prompt, tools]    completions of either kind; ranks from 1, the best
    labelled           prompt, completion, label [, tools]     a good (true) or a bad answer, not compared
    prompt_only        prompt [, anything]                     a string or a list of messages; other columns are kept
    stepwise           prompt, completions, labels             a string or messages, strings, a boolean for each

The first record of a source decides, by the names of its fields, unless the source says `format`;
every record must then be of that format. Other columns are ignored. text and prompt_only yield to
the others, since those rows often carry their prompt or their rendered text beside them. A field
that is null counts as missing. An `id` (string or number) is a key: the same one twice in a source
is an error, because it is what a file that was appended to twice looks like.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmtrain.data.conversations import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    check_answered,
    check_order,
    non_blank,
    parse_messages,
    parse_sharegpt,
    parse_tools,
)
from llmtrain.data.examples import (
    Conversation,
    Example,
    Labelled,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Stepwise,
    Text,
)
from llmtrain.data.judged_formats import (
    check_same_kind,
    parse_labelled,
    parse_preference,
    parse_ranking,
    parse_stepwise,
    prompt_messages,
)
from llmtrain.data.records import Record, read_records
from llmtrain.data.sources import describe
from llmtrain.errors import InputError, nearest
from llmtrain.recipe.schema import JSONLSource, Source
from llmtrain.recipe.schema.data import RecordSource

__all__ = [
    "Conversation",
    "Example",
    "Labelled",
    "Preference",
    "PromptCompletion",
    "PromptOnly",
    "Ranking",
    "Stepwise",
    "Text",
    "read_examples",
]


def read_examples(source: Source, *, labelled: bool = False) -> Iterator[Example]:
    """The examples of a source in the order of its records.

    Args:
        labelled: a completion with a label is of format labelled, whatever its label is; otherwise a label that is
            no boolean is some other column.

    Raises:
        InputError: with file and line, what was found, what was expected and an example of it.
    """
    reader = _Reader(source, labelled)
    ids = _Ids(source, reader.columns.get("id", "id"))
    for record in read_records(source):
        ids.check(record)
        yield reader.example(record)


class _Reader:
    """Turns the records of one source into examples of one format."""

    def __init__(self, source: Source, labelled: bool):
        self.columns: dict[str, str] = {}
        self._labelled = labelled
        self._format: str | None = None
        if isinstance(source, RecordSource):
            self.columns = {"text": source.field} if source.field != "text" else {}
            self.columns |= source.columns
            self._format = source.format if source.format != "auto" else None
        self._why = "as the recipe says"
        self._source, self._columns_checked = source, False
        known = {name for shape in SHAPES.values() for name in (*shape.required, *shape.optional)} | {"id"}
        for name in self.columns.keys() - known:
            message = f"columns renames to {name!r}, which no format has{nearest(name, known)}"
            raise InputError(message, where=describe(source), remedy="write columns as {the format's name: yours}")

    def example(self, record: Record) -> Example:
        fields = self._renamed(record)
        if not self._columns_checked:
            self._check_columns(record)
            self._columns_checked = True
        if self._format is None:
            self._format = _detect(fields, record.where, self._labelled)
            self._why = f"as {record.where} is"
        shape = SHAPES[self._format]
        missing = [name for name in shape.required if name not in fields]
        if missing:
            raise self._missing(missing[0], fields, record.where)
        return shape.parse(fields, record.where)

    def _renamed(self, record: Record) -> dict[str, Any]:
        fields = {name: value for name, value in record.fields.items() if value is not None}
        taken = {name: fields.pop(theirs) for name, theirs in self.columns.items() if theirs in fields}
        return {**fields, **taken}

    def _check_columns(self, record: Record) -> None:
        """Refuses a name of `columns` that the first record lacks; in JSON Lines it may lack what is optional."""
        if not isinstance(self._source, RecordSource):
            return
        # What the recipe's own format requires is missed where it is looked for, with an example of the format.
        shapes = SHAPES.values() if self._format is None else [SHAPES[self._format]]
        required = {name for shape in shapes for name in shape.required}
        for name, theirs in self._source.columns.items():
            needed = self._format is None if name in required else not isinstance(self._source, JSONLSource)
            if needed and theirs not in record.fields:
                there = ", ".join(record.fields) or "none"
                message = f"`columns` of the source names {theirs!r} for {name!r}, and there is no such field"
                message = f"{message}; fields there: {there}{nearest(theirs, record.fields)}"
                raise InputError(message, where=record.where, remedy="correct `columns` of this source, or the record")

    def _missing(self, name: str, fields: dict[str, Any], where: str) -> InputError:
        assert self._format is not None
        mine = set(SHAPES[self._format].required)
        found = [other for other in _matches(fields, self._labelled) if not mine.issuperset(SHAPES[other].required)]
        expected = f"expected here ({self._why}): {SHAPES[self._format].example}"
        if found:
            message = f"mixed formats: a record of format {found[0]} where {self._format} is expected"
            return InputError(message, where=where, remedy=f"give each format a source of its own; {expected}")
        theirs = self.columns.get(name, name)
        there = ", ".join(fields) or "none"
        message = f"format {self._format}: no field {theirs!r}; fields there: {there}{nearest(theirs, fields)}"
        return InputError(message, where=where, remedy=f"{expected}; other names: `columns` of this source")


class _Ids:
    """Finds an id that was there before.

    Only hashes are kept, about 60 bytes a record. Where one comes twice, the source is read again up
    to there: for the place of the first, and because two ids may share a hash.
    """

    def __init__(self, source: Source, field: str):
        self._source, self._field, self._seen = source, field, set[int]()

    def check(self, record: Record) -> None:
        key = record.fields.get(self._field)
        if not isinstance(key, str | int) or isinstance(key, bool):
            return
        mark = hash(key)
        if mark not in self._seen:
            self._seen.add(mark)
            return
        for earlier in read_records(self._source):
            if earlier.where == record.where:
                return
            other = earlier.fields.get(self._field)
            if other == key and not isinstance(other, bool):
                raise InputError(
                    f"id {key!r} is there twice; first at {earlier.where}",
                    where=record.where,
                    remedy=f"give each record an id of its own; if {self._field!r} is no key here, name the field that "
                    "is one by `columns: {id: other_field}` of this source, or remove it from the records",
                )


def _matches(fields: dict[str, Any], labelled: bool) -> list[str]:
    """The formats whose required fields are all there; text and prompt_only only where there is no other."""
    found = [name for name, shape in SHAPES.items() if all(required in fields for required in shape.required)]
    if "labelled" in found:
        found.remove("prompt_completion" if labelled or isinstance(fields["label"], bool) else "labelled")
    return [name for name in found if name not in WEAK] or found


def _detect(fields: dict[str, Any], where: str, labelled: bool) -> str:
    found = _matches(fields, labelled)
    if len(found) > 1:
        message = f"may be of format {' or '.join(found)}; fields: {', '.join(fields)}"
        raise InputError(message, where=where, remedy="set `format` of this source to the one that is meant")
    if not found:
        names = {name for shape in SHAPES.values() for name in shape.required}
        hints = [hint for name in fields if name not in names and (hint := nearest(name, names))]
        likely = _likely_columns(fields)
        hint = hints[0] if hints and not likely else ""
        message = f"no known format has these fields: {', '.join(fields) or 'none'}{hint}"
        formats = "; ".join(f"{name}: {', '.join(shape.required)}" for name, shape in SHAPES.items())
        remedy = f"name them by `{likely or 'columns'}` of this source; formats are {formats}"
        raise InputError(message, where=where, remedy=remedy)
    return found[0]


def _likely_columns(fields: dict[str, Any]) -> str:
    """The `columns` that would make a format of fields with other usual names; empty where there are none."""
    for shape in SHAPES.values():
        names = {}
        for name in (*shape.required, *shape.optional):
            other = next((other for other in USUAL_NAMES.get(name, ()) if other in fields), None)
            if name not in fields and other is not None and other not in shape.required:
                names[name] = other
        if names and all(name in fields or name in names for name in shape.required):
            return f"columns: {{{', '.join(f'{name}: {other}' for name, other in names.items())}}}"
    return ""


def _text(fields: dict[str, Any], where: str) -> Example:
    return Text(non_blank(fields["text"], "text", where, "leave the record out"), where)


def _messages(fields: dict[str, Any], where: str) -> Example:
    messages = parse_messages(fields["messages"], "messages", where)
    return _conversation(messages, "messages", where, parse_tools(fields.get("tools"), where))


def _conversation(messages: list[Message], name: str, where: str, tools: list[dict[str, Any]] | None) -> Example:
    check_answered(messages, name, where)
    check_order(messages, name, where)
    return Conversation(messages, where, tools)


def _sharegpt(fields: dict[str, Any], where: str) -> Example:
    messages = parse_sharegpt(fields["conversations"], "conversations", where)
    system = _system(fields, where)
    if system and messages[0]["role"] == SYSTEM:
        message = "a system message twice: in the column system and in conversations[0]"
        raise InputError(message, where=where, remedy="leave one of them out")
    tools = parse_tools(fields.get("tools"), where, wrap=True)
    check_answered(messages, "conversations", where)
    check_order(messages, "conversations", where)
    return Conversation([*system, *messages], where, tools)


def _system(fields: dict[str, Any], where: str) -> list[Message]:
    if fields.get("system", "") == "":
        return []
    content = non_blank(fields["system"], "system", where, "leave the field out, or write the system message")
    return [{"role": SYSTEM, "content": content}]


def _alpaca(fields: dict[str, Any], where: str) -> Example:
    instruction = non_blank(fields["instruction"], "instruction", where, "write it, or leave the record out")
    output = non_blank(fields["output"], "output", where, "write the answer, or leave the record out")
    more = fields.get("input", "")
    if more != "":
        instruction += "\n" + non_blank(more, "input", where, 'write "" where there is none')
    messages = _system(fields, where)
    history = fields.get("history", [])
    for index, pair in enumerate(history if isinstance(history, list) else [history]):
        remedy = "history is a list of pairs [instruction, answer]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"history[{index}] is no pair", where=where, remedy=remedy)
        for role, text in zip((USER, ASSISTANT), pair, strict=True):
            messages.append({"role": role, "content": non_blank(text, f"history[{index}]", where, remedy)})
    messages += [{"role": USER, "content": instruction}, {"role": ASSISTANT, "content": output}]
    return Conversation(messages, where)


def _prompt_completion(fields: dict[str, Any], where: str) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    check_same_kind({"prompt": prompt, "completion": completion}, where)
    if not isinstance(prompt, list):
        remedy = "for texts without a prompt use format text"
        prompt = non_blank(prompt, "prompt", where, remedy)
        return PromptCompletion(prompt, non_blank(completion, "completion", where, "leave the record out"), where)
    asked = prompt_messages(prompt, where)
    answered = parse_messages(completion, "completion", where)
    check_order(answered, "completion", where, after=asked[-1]["role"])
    return Conversation([*asked, *answered], where, parse_tools(fields.get("tools"), where), num_prompt=len(asked))


def _prompt_only(fields: dict[str, Any], where: str) -> Example:
    prompt = fields["prompt"]
    columns = {name: value for name, value in fields.items() if name != "prompt"}
    if isinstance(prompt, list):
        return PromptOnly(prompt_messages(prompt, where), columns, where)
    return PromptOnly(non_blank(prompt, "prompt", where, "write it, or leave the record out"), columns, where)


class _Shape(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    parse: Callable[[dict[str, Any], str], Example]


SHAPES: dict[str, _Shape] = {
    "messages": _Shape(
        ("messages",),
        ("tools",),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        _messages,
    ),
    "sharegpt": _Shape(
        ("conversations",),
        ("system", "tools"),
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        _sharegpt,
    ),
    "alpaca": _Shape(
        ("instruction", "output"),
        ("input", "system", "history"),
        '{"instruction": "...", "input": "", "output": "..."}',
        _alpaca,
    ),
    "prompt_completion": _Shape(
        ("prompt", "completion"), ("tools",), '{"prompt": "...", "completion": "..."}', _prompt_completion
    ),
    "preference": _Shape(
        ("chosen", "rejected"),
        ("prompt", "margin", "tools"),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        parse_preference,
    ),
    "ranking": _Shape(
        ("completions", "ranks"),
        ("prompt", "tools"),
        '{"prompt": "...", "completions": ["good", "better"], "ranks": [2, 1]}',
        parse_ranking,
    ),
    "labelled": _Shape(
        ("prompt", "completion", "label"),
        ("tools",),
        '{"prompt": "...", "completion": "...", "label": true}',
        parse_labelled,
    ),
    "stepwise": _Shape(
        ("prompt", "completions", "labels"),
        (),
        '{"prompt": "...", "completions": ["step 1", "step 2"], "labels": [true, false]}',
        parse_stepwise,
    ),
    "text": _Shape(("text",), (), '{"text": "..."}', _text),
    "prompt_only": _Shape(("prompt",), (), '{"prompt": "...", "answer": "..."}', _prompt_only),
}
WEAK = ("text", "prompt_only")
_ANSWERS = ("response", "answer", "output", "completion")
# What other data calls the fields: no guess is made, but a hint is given.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "output": _ANSWERS,
    "completion": _ANSWERS,
    "input": ("context",),
    "prompt": ("question", "query", "instruction"),
    "instruction": ("question", "query"),
}
