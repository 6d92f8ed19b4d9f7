"""Whether a rendered conversation holds everything that its messages say.

Templates pass over what they do not know: a role, tool calls, a key. What a message says is looked for in
the text in the order of the messages, each after the one before it, so that an answer which repeats a
tool's result does not stand for it. White space around contents is the template's own affair, as are the
<think> tags in an assistant's content, and how JSON is written.

Two liberties. The system message may stand anywhere: some templates write it before the last question.
And the reasoning of an assistant turn before the last user message may be missing, if the template writes
that of a last turn: model families drop earlier reasoning from what the model reads, and so do their
templates. Reasoning is what THOUGHTS name, and a <think> block that begins a content.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from llmtrain.data.conversations import ASSISTANT, SYSTEM, THOUGHTS, TOOL, USER, Message, article

INLINE = "<think>"  # the name of reasoning in content, beside those of THOUGHTS
_BLOCK = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_TAG = re.compile(r"</?think>")
_SHOWN = 40


def first_missing(
    text: str, messages: list[Message], tools: list[dict[str, Any]] | None, written: set[str]
) -> str | None:
    """What the text lacks of the conversation, in words that follow "it leaves out"; None if it has all.

    Args:
        text: what the template wrote.
        messages: of the conversation.
        tools: likewise.
        written: which forms of reasoning (of THOUGHTS, and INLINE) the template writes in a last turn.
    """
    search = _Search(text)
    last_question = max((i for i, message in enumerate(messages) if message["role"] == USER), default=-1)
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", message["role"]
        if role != TOOL:  # results may be written in another order, and before the words beside the calls
            search.go_on()
        content = message.get("content", "")
        if role == ASSISTANT:
            droppable = written if index < last_question else set()
            given = {key: message[key] for key in THOUGHTS if isinstance(message.get(key), str)}
            dropped = {given[key] for key in given.keys() & droppable}
            # Two keys may hold the same thought, which is written once.
            for thought, key in {thought: key for key, thought in given.items() if thought not in dropped}.items():
                if not search.has(thought):
                    return f"{where}.{key}{_shown(thought)}"
            begins = _BLOCK.match(content) if INLINE in droppable else None
            pieces = _TAG.split(content[begins.end() if begins else 0 :])
        else:
            pieces = [content]
        for piece in pieces:
            there = piece.strip() in text if role == SYSTEM else search.has(piece, as_json=role == TOOL)
            if not there:
                return f"{where}, {article(role)} message, or changes it{_shown(piece)}"
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if not search.has(function["name"], as_json=True):
                return f"the call of {function['name']!r} in {where}; it has no tool calls"
            arguments = function.get("arguments")
            lost = next((piece for piece in _said_by(arguments) if not search.has(piece, as_json=True)), None)
            # JSON text that is written as it is may have escapes of its own, such as "\/".
            if lost is not None and not (isinstance(arguments, str) and search.has(arguments)):
                return f"arguments of the call of {function['name']!r} in {where}{_shown(lost)}"
    for tool in tools or ():
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            return f"the tool {name!r}; it has no tools"
    return None


class _Search:
    """Looks for pieces of messages in the order of the messages; those of one stand in any order.

    Every piece is taken where it first occurs, which is never after where it was written.
    """

    def __init__(self, text: str):
        self._text = text
        self._begin = self._end = 0
        self._ends: dict[str, int] = {}

    def go_on(self) -> None:
        """To the next message, which stands behind all that was found."""
        self._begin, self._ends = self._end, {}

    def has(self, piece: str, *, as_json: bool = False) -> bool:
        """Whether it is there, for the second time if it was asked for before; maybe as in a string of JSON."""
        piece = piece.strip()
        if not piece:
            return True
        forms = {piece}
        if as_json:
            forms |= {json.dumps(piece, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)}
        begin = self._ends.get(piece, self._begin)
        ends = [found + len(form) for form in forms if (found := self._text.find(form, begin)) >= 0]
        if not ends:
            return False
        self._ends[piece] = min(ends)
        self._end = max(self._end, self._ends[piece])
        return True


def _said_by(arguments: Any) -> Iterator[str]:
    """Names and strings of a call's arguments, which may be JSON text."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is not JSON is looked for as it is
            arguments = json.loads(arguments)
    yield from _names_and_strings(arguments)


def _names_and_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _names_and_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names_and_strings(item)


def _shown(piece: str) -> str:
    piece = piece.strip()
    shown = piece if len(piece) <= _SHOWN else piece[:_SHOWN] + "..."
    return f": {shown!r} is not where it belongs"
