"""Lists of messages: their roles, their order, their content, and what is wrong with them.

A message is a dict as chat templates take it: `role`, `content` (a string; an assistant's may be
missing beside `tool_calls`), and whatever else the data has (`name`, `tool_call_id`,
`reasoning_content`). Keys whose value is null are left out, as transformers does.
"""

import json
from typing import Any

from llmtrain.data.sources import json_type
from llmtrain.errors import InputError, nearest

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
# What other projects call them: no guess is made, but a hint is given.
ALIASES = {
    "human": USER,
    "gpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "developer": SYSTEM,
    "function": TOOL,
    "observation": TOOL,
    "ipython": TOOL,
}
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER, TOOL),
    TOOL: (TOOL, ASSISTANT),
}
SHAREGPT_ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
    "function_call": ASSISTANT,
    "observation": TOOL,
    "tool": TOOL,
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of what the assistant thinks before it answers
# Keys by which turns say how they are to be trained, with the value that asks for the whole turn, which is what is
# done (1 is true); None where no value surely does.
TRAINING_KEYS: dict[str, bool | None] = {
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "loss_weight": True,
    "loss_scale": True,
    "mask": None,
    "masked": False,
    "train_detail": None,
    "training_detail": None,
}
MESSAGES_EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
CALLS_EXAMPLE = '[{"type": "function", "function": {"name": "...", "arguments": {}}}]'
TOOL_EXAMPLE = '{"role": "tool", "content": "..."}, with "" where the tool returned nothing'
SHAREGPT_CALL_EXAMPLE = '{"name": "...", "arguments": {}}'


def parse_messages(value: Any, name: str, where: str) -> list[Message]:
    """The messages of a field, each checked by itself.

    Raises:
        InputError: naming field, index and what is wrong, as `messages[2]: unknown role 'usr'`.
    """
    turns = _turns(value, name, where, MESSAGES_EXAMPLE)
    return [_message(turn, f"{name}[{index}]", where) for index, turn in enumerate(turns)]


def parse_sharegpt(value: Any, name: str, where: str) -> list[Message]:
    """The turns of a ShareGPT conversation as messages."""
    turns = _turns(value, name, where, '[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]')
    return [_sharegpt_message(turn, f"{name}[{index}]", where) for index, turn in enumerate(turns)]


def check_order(messages: list[Message], name: str, where: str, after: str | None = None) -> None:
    """Refuses turns in an order that no chat has.

    Args:
        messages: of the field `name`.
        name: for the error.
        where: likewise.
        after: role of the message before the first one; None where the conversation begins here.
    """
    previous = after
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWERS[previous]:
            raise InputError(
                f"{name}[{index}]: wrong order of roles: {_disorder(role, previous)}",
                where=where,
                remedy="write the turns as (system,) user, assistant, user, assistant, ...; tool turns stand between "
                "the assistant turn that calls and the next one; join turns of the same role",
            )
        previous = role


def _disorder(role: str, previous: str | None) -> str:
    if role == SYSTEM:
        return "a system message stands first or not at all"
    if previous is None:
        return f"the conversation begins with {article(role)} turn, not with a user's"
    return f"{article(role)} turn after {article(previous)} turn; expected: {' or '.join(FOLLOWERS[previous])}"


def check_answered(messages: list[Message], name: str, where: str) -> None:
    """Refuses a conversation in which no assistant speaks."""
    if all(message["role"] == SYSTEM for message in messages):
        remedy = "add the user's turn and the assistant's, or leave the record out"
        raise InputError(f"{name} has only a system message", where=where, remedy=remedy)
    if all(message["role"] != ASSISTANT for message in messages):
        message = f"{name} has no assistant turn, so there is nothing to learn in it"
        raise InputError(message, where=where, remedy="add the answer, or leave the record out")


def check_asks(messages: list[Message], name: str, where: str) -> None:
    """Refuses a prompt that the assistant could not answer next."""
    last = messages[-1]["role"]
    if last not in (USER, TOOL):
        message = f"{name} ends with {article(last)} turn; a prompt ends with a user or tool turn"
        raise InputError(message, where=where, remedy="move the assistant's turns to the completion, or add a question")


def parse_tools(value: Any, where: str, *, wrap: bool = False) -> list[dict[str, Any]] | None:
    """Descriptions of tools, from a list or from JSON text of one; None where there are none.

    Args:
        value: of the column `tools`.
        where: for the error.
        wrap: put bare {"name", "description", "parameters"} into {"type": "function", "function": ...}, as
            LLaMA-Factory does.
    """
    example = '[{"type": "function", "function": {"name": "...", "parameters": {}}}]'
    remedy = f"give a list, or JSON text of one, such as {example}"
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"tools is a string that is not JSON: {error}", where=where, remedy=remedy) from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        what = "an array of other things" if isinstance(value, list) else f"{a_type(value)}"
        raise InputError(f"tools is {what}, not an array of objects", where=where, remedy=remedy)
    return [tool if not wrap or "function" in tool else {"type": "function", "function": tool} for tool in value]


def non_blank(value: Any, name: str, where: str, remedy: str) -> str:
    """The value, if it is a string with something in it."""
    if not isinstance(value, str):
        shown = f" ({value!r})" if isinstance(value, int | float) else ""
        quotes = "put it in quotes" if shown else remedy
        raise InputError(f"{name} is {a_type(value)}{shown}, not a string", where=where, remedy=quotes)
    if not value or value.isspace():
        raise InputError(f"{name} is empty", where=where, remedy=remedy)
    return value


def a_type(value: Any) -> str:
    """What JSON calls a value, with its article."""
    kind = json_type(value)
    return f"an {kind}" if kind in ("array", "object") else f"a {kind}"


def _turns(value: Any, name: str, where: str, example: str) -> list[dict[str, Any]]:
    remedy = f"give a list of messages such as {example}"
    if not isinstance(value, list):
        raise InputError(f"{name} is {a_type(value)}, not an array of messages", where=where, remedy=remedy)
    if not value:
        raise InputError(f"{name} is empty", where=where, remedy="add its messages, or leave the record out")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise InputError(f"{name}[{index}] is {a_type(turn)}, not an object", where=where, remedy=remedy)
    return [{key: item for key, item in turn.items() if item is not None} for turn in value]


def _require(turn: dict[str, Any], key: str, name: str, where: str, example: str) -> Any:
    if key not in turn:
        message = f"{name} has no {key!r}; there: {', '.join(turn) or 'nothing'}{nearest(key, turn)}"
        raise InputError(message, where=where, remedy=f"a message is {example}")
    return turn[key]


def _role(value: Any, known: tuple[str, ...], name: str, where: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    hint = nearest(value, known) if isinstance(value, str) else ""
    if not hint and isinstance(value, str) and ALIASES.get(value.lower()) in known:
        hint = f"; did you mean {ALIASES[value.lower()]!r}?"
    remedy = f"roles are {', '.join(known)}"
    raise InputError(f"{name}: unknown role {value!r}{hint}", where=where, remedy=remedy)


def _message(turn: dict[str, Any], name: str, where: str) -> Message:
    role = _role(_require(turn, "role", name, where, MESSAGES_EXAMPLE[1:-1]), ROLES, name, where)
    if role == ASSISTANT:
        _check_training_keys(turn, name, where)
    if "function_call" in turn:
        what = "has function_call, the older form of tool_calls, which templates do not write"
        raise InputError(f"{name} {what}", where=where, remedy=f'write "tool_calls": {CALLS_EXAMPLE} instead')
    if not isinstance(turn.get("reasoning_content", ""), str):
        what = a_type(turn["reasoning_content"])
        remedy = "write it as text, or leave it out"
        raise InputError(f"{name}.reasoning_content is {what}, not a string", where=where, remedy=remedy)
    message = {key: value for key, value in turn.items() if key != "tool_calls" or value}
    if "tool_calls" in message:
        if role != ASSISTANT:
            remedy = "give the calls to the assistant's turn"
            raise InputError(f"{name}: {article(role)} turn has tool_calls", where=where, remedy=remedy)
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{name}.tool_calls", where)
        if "content" not in message:
            return message
    example = TOOL_EXAMPLE if role == TOOL else MESSAGES_EXAMPLE[1:-1]
    content = _joined(_require(turn, "content", name, where, example), f"{name}.content", where)
    if role == TOOL:
        remedy = 'write what the tool returned as a string, an object as its JSON text; "" where it returned nothing'
    elif "tool_calls" in message:
        remedy = "write the words beside the calls as a string, or leave content out"
    else:
        remedy = f"write what the {role} says, or leave the turn out"
    may_be_empty = role == TOOL or "tool_calls" in message  # a tool may return nothing, and a call needs no words
    if content != "" or not may_be_empty:
        non_blank(content, f"{name}.content", where, remedy)
    message["content"] = content
    return message


def _check_training_keys(turn: dict[str, Any], name: str, where: str) -> None:
    """Refuses an assistant's turn that is to be trained in part, with a weight, or not at all."""
    for key, whole in TRAINING_KEYS.items():
        if key in turn and (whole is None or not isinstance(turn[key], int | float) or turn[key] != whole):
            raise InputError(
                f"{name} says by {key!r} ({turn[key]!r}) how it is to be trained, which is not done for single turns",
                where=where,
                remedy=f"leave {key!r} out to train the whole turn; to train only the last one, set data.train_on: "
                "last_assistant, or write the record as prompt and completion",
            )


def _joined(content: Any, name: str, where: str) -> Any:
    """The text of a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else f"{a_type(part)}"
            remedy = 'only text is trained on here: {"type": "text", "text": "..."}'
            raise InputError(f"{name}[{index}] is {kind}, not text", where=where, remedy=remedy)
        parts.append(part["text"])
    return "".join(parts)


def _tool_calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    remedy = f"give calls such as {CALLS_EXAMPLE}"
    if not isinstance(value, list):
        raise InputError(f"{name} is {a_type(value)}, not an array", where=where, remedy=remedy)
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{name}[{index}] names no function", where=where, remedy=remedy)
        _check_arguments(function, f"{name}[{index}]", where)
    return value


def _check_arguments(function: dict[str, Any], name: str, where: str) -> None:
    """Refuses arguments that are neither an object nor JSON text of one."""
    remedy = 'give "arguments" as an object, or as JSON text of one; {} where there are none'
    called = f"{name}, the call of {function['name']!r},"
    if "arguments" not in function:
        raise InputError(f"{called} has no arguments", where=where, remedy=remedy)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{called} has arguments that are not JSON: {error}", where=where, remedy=remedy) from None
    if not isinstance(arguments, dict):
        message = f"{called} has arguments that are {a_type(arguments)}, not an object"
        raise InputError(message, where=where, remedy=remedy)


def _sharegpt_message(turn: dict[str, Any], name: str, where: str) -> Message:
    if "role" in turn and "from" not in turn:
        message = f"{name} has role and content, as in format messages, in place of from and value"
        remedy = "set `columns: {messages: conversations}` on this source"
        raise InputError(message, where=where, remedy=remedy)
    example = '{"from": "human", "value": "..."}'
    speaker = _role(_require(turn, "from", name, where, example), tuple(SHAREGPT_ROLES), name, where)
    value = _require(turn, "value", name, where, example)
    role = SHAREGPT_ROLES[speaker]
    if role == ASSISTANT:
        _check_training_keys(turn, name, where)
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            remedy = f"make it a turn of its own, from function_call, with the value {SHAREGPT_CALL_EXAMPLE}"
            raise InputError(f"{name} has {key}, which turns of this format do not", where=where, remedy=remedy)
    if role == TOOL and value == "":
        return {"role": role, "content": ""}
    text = non_blank(value, f"{name}.value", where, f"write what {speaker} says, or leave the turn out")
    thoughts = {key: turn[key] for key in THOUGHTS if role == ASSISTANT and isinstance(turn.get(key), str)}
    if speaker != "function_call":
        return {"role": role, "content": text, **thoughts}
    calls = _sharegpt_calls(text, f"{name}.value", where)
    return {"role": role, "content": "", "tool_calls": calls, **thoughts}


def _sharegpt_calls(text: str, name: str, where: str) -> list[dict[str, Any]]:
    remedy = f"give JSON text such as {SHAREGPT_CALL_EXAMPLE}, or an array of such"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is a function call that is not JSON: {error}", where=where, remedy=remedy) from None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise InputError(f"{name} is a function call without a name", where=where, remedy=remedy)
    functions = [{"arguments": {}, **call} for call in calls]
    for function in functions:
        _check_arguments(function, name, where)
    return [{"type": "function", "function": function} for function in functions]


def article(role: str) -> str:
    """A role with its article."""
    return f"an {role}" if role == ASSISTANT else f"a {role}"
