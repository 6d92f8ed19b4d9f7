"""Conversations as text, with the characters that each assistant turn covers.

Where a template marks what the assistant says (`{% generation %}`), its marks are taken, by characters
that are written in their place (transformers counts, and counts wrongly inside of macros). Otherwise the
turn's text is what its rendering adds: the conversation up to the turn with the prompt to answer is
rendered, and the conversation through the turn; each must be the beginning of the next and of the
whole (less an EOS that some write at the end of the whole). A template that writes a turn differently
when others follow (Qwen3 takes the thoughts of earlier turns away) breaks that, and is refused rather
than masked by guess.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from llmtrain.data.chat_template_files import CHOICES, is_marked, with_signs
from llmtrain.data.completeness import INLINE, first_missing
from llmtrain.data.conversations import ASSISTANT, THOUGHTS, Message
from llmtrain.errors import InputError

PRIVATE_USE = re.compile("[\U000f0000-\U000ffffd]")
Tools = list[dict[str, Any]] | None

_TURN: list[Message] = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
_CALL: Message = {"type": "function", "function": {"name": "look_up", "arguments": {"probe": 1}}}
_TOOLS: Tools = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
_CALLING: list[Message] = [_TURN[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
_THOUGHT = "a thought"
_THINKING: dict[str, Message] = {
    INLINE: {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\nan answer"},
    **{key: {**_TURN[1], key: _THOUGHT} for key in THOUGHTS},
}
_CALLED: list[Message] = [*_CALLING, {"role": "tool", "content": "found"}, _TURN[1]]


class Refused(Exception):
    """The template raised, or does not write what it was given; the text says why."""


class Underivable(Exception):
    """The template neither marks assistant turns nor writes them so that they can be found."""


class Rendering(NamedTuple):
    """Text, and the [start, end) characters that the template marked."""

    text: str
    marks: list[tuple[int, int]]


class ChatRenderer:
    """A chat template with the special tokens of a tokenizer.

    Attributes:
        template: Jinja text.
        marked: whether it marks what the assistant says.

    Raises:
        InputError: it is not Jinja, or marks what the user says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        self.template, self.marked = template, is_marked(template)
        self._tokenizer, self._source = tokenizer, with_signs(template) if self.marked else template
        asked = self._try(_TURN[:1], None, answer=True)
        self._has_prompt = asked is None or asked != self._try(_TURN[:1], None)
        self._arguments = self._form_of_arguments()
        self._tail = self._tail_of_whole(str(tokenizer.eos_token))
        self._thoughts = {
            form for form, turn in _THINKING.items() if _THOUGHT in (self._try([_TURN[0], turn], None) or "")
        }
        self._check_marks()

    def render(self, messages: Sequence[Message], tools: Tools = None, *, answer: bool = False) -> Rendering:
        """The text; with `answer`, up to where the assistant is to go on.

        Raises:
            Refused: the template raised.
        """
        signs = free_characters([messages, tools], 2)
        begin, end = signs[0], signs[1]
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._source,
                add_generation_prompt=answer,
                tokenize=False,
                begin_sign=begin,
                end_sign=end,
            )
        except TemplateSyntaxError as error:
            remedy = f"correct the template; data.chat_template takes {CHOICES}"
            message = f"line {error.lineno} is no Jinja: {error.message}"
            raise InputError(message, where="data.chat_template", remedy=remedy) from None
        # A template computes with whatever it is given: "x" + undefined is a TypeError of Python.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise Refused(str(error)) from error
        assert isinstance(text, str)
        return _found_signs(text, begin, end) if self.marked else Rendering(text, [])

    def spans(
        self, messages: list[Message], tools: Tools, wanted: Literal["assistant", "last_assistant"], first: int = 0
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the characters of the assistant turns among messages[first:].

        Marks are taken in order: each turn has one or more of its own, which say what it says.

        Raises:
            Refused: the template raised, or leaves out what a message says.
            Underivable: no marks, and a turn's text cannot be told.
        """
        messages, tools = self._adapted(messages, tools)
        whole = self.render(messages, tools)
        self.check_complete(whole.text, messages, tools)
        turns = [index for index in range(first, len(messages)) if messages[index]["role"] == ASSISTANT]
        if wanted == "last_assistant":
            turns = turns[-1:]
        if not turns:
            return whole.text, []
        if not self.marked:
            return whole.text, [self._span(index, messages, tools, whole.text) for index in turns]
        earlier = sum(message["role"] == ASSISTANT for message in messages[: turns[0]])
        if earlier:  # counted, not measured: the same turns have as many marks, however they are written
            earlier = len(self.render(messages[: turns[0]], tools, answer=True).marks)
        marks = whole.marks[earlier:]
        unclaimed = iter(marks)
        for index in turns:
            said = ""
            while not _says(said, messages[index]):
                mark = next(unclaimed, None)
                if mark is None:
                    raise Refused(f"its marks are not around what messages[{index}] says")
                said += whole.text[slice(*mark)]
        return whole.text, marks

    def text(self, messages: list[Message], tools: Tools) -> str:
        """The whole text, where no turn needs to be found; raises Refused."""
        messages, tools = self._adapted(messages, tools)
        text = self.render(messages, tools).text
        self.check_complete(text, messages, tools)
        return text

    def keeps_prefixes(self) -> bool:
        """Whether turns of usual conversations can be found (or need not, where they are marked)."""
        for messages, tools in ((_TURN * 2, None), (_CALLED, _TOOLS)):
            try:
                self.spans(messages, tools, "assistant")
            except Refused:
                continue  # it has no tools, say
            except Underivable:
                return False
        return True

    def agrees(self, other: "ChatRenderer") -> bool:
        """Whether both write the same where there is one assistant turn, with and without tools and thoughts."""
        system: Message = {"role": "system", "content": "a rule"}
        thinking = _THINKING["reasoning_content"]
        chats: list[tuple[list[Message], Tools, bool]] = [
            (_TURN, None, False),
            ([system, *_TURN], None, False),
            ([_TURN[0], thinking], None, False),
            (_CALLING, _TOOLS, False),
            ([system, *_CALLING], _TOOLS, False),
            (_TURN[:1], None, True),
            ([system, _TURN[0]], _TOOLS, True),
        ]
        return all(
            self._try(messages, tools, answer=answer) == other._try(messages, tools, answer=answer)
            for messages, tools, answer in chats
        )

    def _span(self, index: int, messages: list[Message], tools: Tools, whole: str) -> tuple[int, int]:
        try:
            before = self.render(messages[:index], tools, answer=True).text
            through = whole if index + 1 == len(messages) else self.render(messages[: index + 1], tools).text
        except Refused as error:
            raise Underivable(f"it refuses the conversation up to messages[{index}]: {error}") from None
        if index + 1 < len(messages):
            through = through.removesuffix(self._tail)
        if not whole.startswith(through) or not through.startswith(before) or len(through) == len(before):
            raise Underivable(f"it writes messages[{index}] differently when other turns follow or are to follow")
        said = through[len(before) :]
        if not _says(said, messages[index]):
            raise Refused(f"it leaves out what messages[{index}] says")
        if not self._has_prompt and not said.lstrip().startswith(_answer(messages[index])):
            raise Underivable("it has no add_generation_prompt, so that the heading of a turn cannot be told from it")
        return len(before), len(through)

    def check_complete(self, text: str, messages: list[Message], tools: Tools) -> None:
        """Refuses a text that lacks what the conversation has, but for reasoning of earlier turns (completeness)."""
        missing = first_missing(text, messages, tools, self._thoughts)
        if missing is not None:
            raise Refused(f"it leaves out {missing}")

    def _try(self, messages: list[Message], tools: Tools, *, answer: bool = False) -> str | None:
        try:
            return self.render(messages, tools, answer=answer).text
        except Refused:
            return None

    def _check_marks(self) -> None:
        if not self.marked:
            return
        try:
            text, marks = self.render(_TURN)
        except Refused:
            return
        if any(_TURN[0]["content"] in text[start:end] for start, end in marks):
            message = "the chat template's {% generation %} marks are around what the user says, too"
            remedy = "put them around what the assistant writes, with the token that ends its turn"
            raise InputError(message, where="data.chat_template", remedy=remedy)

    def _tail_of_whole(self, eos: str) -> str:
        """The EOS, if it is written once, after the last turn; such as Phi 3's beside the tokens that end turns."""
        one, two = self._try(_TURN, None), self._try(_TURN * 2, None)
        if one is None or two is None or two.startswith(one) or not two.startswith(one.removesuffix(eos)):
            return ""
        return eos

    def _form_of_arguments(self) -> Literal["object", "string", "any"]:
        """How the arguments of calls are wanted: some templates encode them as JSON, some add them as text."""
        as_object = self._try(_CALLED, _TOOLS)
        function = {**_CALL["function"], "arguments": json.dumps({"probe": 1})}
        as_text: list[Message] = [dict(message) for message in _CALLED]
        as_text[1]["tool_calls"] = [{**_CALL, "function": function}]
        as_string = self._try(as_text, _TOOLS)
        if as_string is None or '\\"probe' in as_string:  # encoded twice
            return "object" if as_object is not None else "any"
        return "string" if as_object is None or "'probe'" in as_object else "any"

    def _adapted(self, messages: list[Message], tools: Tools) -> tuple[list[Message], Tools]:
        if self._arguments == "any" or not any("tool_calls" in message for message in messages):
            return messages, tools
        adapted = [dict(message) for message in messages]
        for message in adapted:
            if "tool_calls" in message:
                message["tool_calls"] = [self._adapted_call(call) for call in message["tool_calls"]]
        return adapted, tools

    def _adapted_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if self._arguments == "object" and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise Refused(
                    f"it wants arguments that are JSON, and those of {function['name']!r} are not: {error}"
                ) from None
        elif self._arguments == "string" and isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed = {**function, "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed


def _found_signs(text: str, begin: str, end: str) -> Rendering:
    """The text without signs, and where they stood."""
    pieces: list[str] = []
    marks: list[tuple[int, int]] = []
    length = 0
    for number, part in enumerate(text.split(begin)):
        inside, found, outside = part.partition(end) if number else ("", end, part)
        if not found or end in outside:
            raise Refused("it takes its {% generation %} marks apart: begin and end do not alternate")
        if number:
            marks.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return Rendering("".join(pieces), marks)


def _answer(message: Message) -> str:
    """What is surely written of an assistant's turn: thoughts may be left out, or stand elsewhere."""
    content: str = message.get("content", "")
    return content.rpartition("</think>")[2].strip()


def _says(text: str, message: Message) -> bool:
    calls = message.get("tool_calls", ())
    said = bool(text) and _answer(message) in text
    return said and all(call.get("function", call)["name"] in text for call in calls)


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def free_characters(value: Any, number: int) -> str:
    """So many characters that no string in a JSON value has, of those that Unicode gives no meaning."""
    used = {character for text in strings(value) for character in PRIVATE_USE.findall(text)}
    return "".join(islice((chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used), number))
