"""What single messages may ask for and hold, in both formats of turns."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.conversations import TRAINING_KEYS
from llmtrain.data.formats import Conversation
from tests.unit.data.chats import CALLING, WEATHER, assistant, tool, user
from tests.unit.data.test_formats import error_of, read


def called(**function: Any) -> list[dict[str, Any]]:
    return [user("Weather?"), assistant("", tool_calls=[{"type": "function", "function": function}])]


# ------------------------------------------------------------------------------ training of single turns


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 0),
        ("weight", 0.5),
        ("weight", "0"),
        ("train", False),
        ("training", 0),
        ("loss", False),
        ("loss_mask", 0),
        ("masked", True),
        ("mask", 1),
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
    ],
)
def test_a_turn_that_asks_not_to_be_trained_whole_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    error = error_of(tmp_path, {"messages": [user("a"), assistant("b", **{key: value})]})
    assert error.message.startswith(f"messages[1] says by {key!r} ({value!r}) how it is to be trained")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: value}]
    error = error_of(tmp_path, {"conversations": turns})
    assert error.message.startswith(f"conversations[1] says by {key!r} ({value!r}) how it is to be trained")
    assert error.remedy and f"leave {key!r} out" in error.remedy and "last_assistant" in error.remedy


@pytest.mark.parametrize("key", [key for key, whole in TRAINING_KEYS.items() if whole is not None])
def test_a_turn_that_asks_to_be_trained_whole_is(tmp_path: Path, key: str) -> None:
    for whole in (TRAINING_KEYS[key], int(bool(TRAINING_KEYS[key]))):
        # What is not the assistant's is not trained anyway.
        messages = [{**user("a"), key: not whole}, assistant("b", **{key: whole})]
        assert isinstance(read(tmp_path, {"messages": messages})[0], Conversation)
        turns = [{"from": "human", "value": "a", key: not whole}, {"from": "gpt", "value": "b", key: whole}]
        assert read(tmp_path, {"conversations": turns}) == [Conversation([user("a"), assistant("b")], "")]


# -------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"arguments": "oops"}, "has arguments that are not JSON: Expecting value"),
        ({"arguments": ""}, "has arguments that are not JSON: Expecting value"),
        ({"arguments": "[1]"}, "has arguments that are an array, not an object"),
        ({"arguments": [1]}, "has arguments that are an array, not an object"),
        ({"arguments": None}, "has arguments that are a null, not an object"),
        ({}, "has no arguments"),
    ],
)
def test_arguments_of_calls_are_objects(tmp_path: Path, function: dict[str, Any], message: str) -> None:
    error = error_of(tmp_path, {"messages": called(name="weather", **function)})
    assert error.message.startswith(f"messages[1].tool_calls[0], the call of 'weather', {message}")
    assert error.remedy and "{} where there are none" in error.remedy


def test_arguments_may_be_json_text(tmp_path: Path) -> None:
    messages = called(name="weather", arguments='{"city": "Paris"}')
    assert read(tmp_path, {"messages": messages}) == [Conversation(messages, "")]


def test_arguments_of_sharegpt_calls_are_objects(tmp_path: Path) -> None:
    def turns(call: dict[str, Any]) -> list[dict[str, str]]:
        return [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]

    error = error_of(tmp_path, {"conversations": turns({"name": "weather", "arguments": "oops"})})
    assert error.message.startswith("conversations[1].value, the call of 'weather', has arguments that are not JSON")
    (example,) = read(tmp_path, {"conversations": turns({"name": "weather"})})
    assert isinstance(example, Conversation)
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}


@pytest.mark.parametrize("content", [None, "ok"])
def test_the_older_form_of_calls_is_refused(tmp_path: Path, content: str | None) -> None:
    turn = {"role": "assistant", "content": content, "function_call": {"name": "weather", "arguments": "{}"}}
    error = error_of(tmp_path, {"messages": [user("a"), turn]})
    assert "messages[1] has function_call" in error.message
    assert error.remedy and '"tool_calls": [{"type": "function"' in error.remedy
    assert read(tmp_path, {"messages": [user("a"), {**assistant("b"), "function_call": None}]})


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_beside_a_sharegpt_value_are_refused(tmp_path: Path, key: str) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: [WEATHER]}]
    error = error_of(tmp_path, {"conversations": turns})
    assert f"conversations[1] has {key}" in error.message and error.remedy and "function_call" in error.remedy


# -------------------------------------------------------------------------- results and reasoning


@pytest.mark.parametrize("content", [{"t": 20}, 20, True])
def test_results_of_tools_are_text(tmp_path: Path, content: Any) -> None:
    messages = [*CALLING[:2], {"role": "tool", "content": content}]
    error = error_of(tmp_path, {"messages": messages})
    assert error.message.startswith("messages[2].content is a")
    assert error.remedy and (isinstance(content, int) or "JSON text" in error.remedy)


def test_a_tool_that_returned_nothing_says_so(tmp_path: Path) -> None:
    error = error_of(tmp_path, {"messages": [*CALLING[:2], {"role": "tool", "content": None}]})
    assert "messages[2] has no 'content'" in error.message
    assert error.remedy and '{"role": "tool", "content": "..."}, with ""' in error.remedy
    assert read(tmp_path, {"messages": [*CALLING[:2], tool("")]})


def test_reasoning_of_both_formats(tmp_path: Path) -> None:
    messages = [user("a"), assistant("b", reasoning_content="hm")]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "hm"}]
    assert read(tmp_path, {"conversations": turns}) == read(tmp_path, {"messages": messages})
    error = error_of(tmp_path, {"messages": [user("a"), assistant("b", reasoning_content=["hm"])]})
    assert error.message == "messages[1].reasoning_content is an array, not a string"
