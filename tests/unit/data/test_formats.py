"""Formats: found from the first record, checked in every one, and what bad rows are told."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from llmtrain.data.formats import (
    Conversation,
    Example,
    Labelled,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Stepwise,
    Text,
    read_examples,
)
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Source
from tests.unit.data.chats import MULTI, SINGLE, TOOLS, WEATHER, assistant, system, tool, user

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
GOOD: dict[str, dict[str, Any]] = {
    "text": {"text": "hello"},
    "messages": {"messages": SINGLE},
    "sharegpt": {"conversations": TURNS},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "ranking": {"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1]},
    "labelled": {"prompt": "a", "completion": "b", "label": True},
    "prompt_only": {"prompt": "a", "answer": 4},
    "stepwise": {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
}


def source(path: Path, rows: list[Any], **more: Any) -> Source:
    """A JSON Lines file of the rows; strings are lines as they are."""
    file = path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    made: Source = TypeAdapter(Source).validate_python({"kind": "jsonl", "paths": [str(file)], **more})
    return made


def read(path: Path, *rows: Any, **more: Any) -> list[Example]:
    return list(read_examples(source(path, list(rows), **more)))


def error_of(path: Path, *rows: Any, **more: Any) -> InputError:
    """The error of the last row, which names it and what to do."""
    with pytest.raises(InputError) as caught:
        read(path, *rows, **more)
    assert caught.value.where == f"{path}/rows.jsonl:{len(rows)}"
    assert caught.value.remedy
    return caught.value


# -------------------------------------------------------------------------------------- good records


@pytest.mark.parametrize("name", GOOD)
def test_the_first_record_decides_and_other_columns_are_passed_over(tmp_path: Path, name: str) -> None:
    examples = read(tmp_path, GOOD[name], {**GOOD[name], "source": "web", "score": 0.5})
    assert len(examples) == 2
    assert (examples[0] == examples[1]) == (name != "prompt_only")  # which keeps them
    assert (examples[0].content == examples[1].content) == (name != "prompt_only")
    assert [example.where for example in examples] == [f"{tmp_path}/rows.jsonl:{n}" for n in (1, 2)]
    assert read(tmp_path, GOOD[name], format=name) == examples[:1]


def test_what_the_formats_hold(tmp_path: Path) -> None:
    found = {name: read(tmp_path, row)[0] for name, row in GOOD.items()}
    pair = [user("a"), assistant("b")]
    assert found == {
        "text": Text("hello", ""),
        "messages": Conversation(SINGLE, ""),
        "sharegpt": Conversation(pair, ""),
        "alpaca": Conversation(pair, ""),
        "prompt_completion": PromptCompletion("a", "b", ""),
        "preference": Preference("a", "b", "c", ""),
        "ranking": Ranking("a", ["b", "c"], [2, 1], ""),
        "labelled": Labelled("a", "b", True, ""),
        "prompt_only": PromptOnly("a", {"answer": 4}, ""),
        "stepwise": Stepwise("a", ["b", "c"], [True, False], ""),
    }
    assert len({example.content for example in found.values()}) == len(found) - 1  # sharegpt and alpaca say the same


def test_messages(tmp_path: Path) -> None:
    rich = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Weather?", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "Fine.", "reasoning_content": "hm", "tool_calls": []},
        {"role": "user", "content": "Thanks."},
    ]
    (example,) = read(tmp_path, {"messages": rich, "tools": json.dumps(TOOLS)})
    assert isinstance(example, Conversation) and example.tools == TOOLS
    assert example.messages == [
        system("Be kind."),
        {"role": "user", "content": "Weather?", "name": "Ann"},
        {"role": "assistant", "tool_calls": [WEATHER]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        assistant("Fine.", reasoning_content="hm"),
        user("Thanks."),
    ]


def test_sharegpt(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    bare = [{"name": "weather", "description": "Look up", "parameters": {}}]
    row = {"conversations": turns, "system": "Be kind.", "tools": json.dumps(bare)}
    (example,) = read(tmp_path, row)
    messages = [
        system("Be kind."),
        user("Weather?"),
        assistant("", tool_calls=[{"type": "function", "function": call}]),
        {"role": "tool", "content": "sunny"},
        assistant("It is sunny."),
    ]
    assert example == Conversation(messages, "", TOOLS)
    assert read(tmp_path, {"conversations": turns, "system": "", "tools": ""}) == [Conversation(messages[1:], "")]


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be kind.", "history": [["a", "b"]]}
    messages = [system("Be kind."), user("a"), assistant("b"), user("Add.\n2 and 2"), assistant("4")]
    assert read(tmp_path, row) == [Conversation(messages, "")]


def test_prompts_and_completions_of_messages(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": MULTI[:4], "completion": MULTI[4:]}) == [Conversation(MULTI, "", num_prompt=4)]
    (pair,) = read(tmp_path, {"prompt": SINGLE[:1], "chosen": SINGLE[1:], "rejected": [assistant("5")]})
    assert pair == Preference(SINGLE[:1], SINGLE[1:], [assistant("5")], "")
    (implicit,) = read(tmp_path, {"chosen": SINGLE, "rejected": [*SINGLE[:1], assistant("5")]})
    assert implicit == Preference(None, SINGLE, [*SINGLE[:1], assistant("5")], "")
    assert read(tmp_path, {"prompt": SINGLE[:1], "answer": "4"}) == [PromptOnly(SINGLE[:1], {"answer": "4"}, "")]


def test_columns_rename(tmp_path: Path) -> None:
    row = {"question": "a", "answer": "b", "prompt_id": 3}
    columns = {"prompt": "question", "completion": "answer"}
    assert read(tmp_path, row, columns=columns) == [PromptCompletion("a", "b", "")]
    assert read(tmp_path, {"body": "hello"}, field="body") == [Text("hello", "")]
    with pytest.raises(InputError, match="columns renames to 'completon', which no format has; did you mean 'compl"):
        read(tmp_path, row, columns={"completon": "answer"})


def test_rows_of_tables_have_nulls_for_what_they_lack(tmp_path: Path) -> None:
    rows = [{"messages": SINGLE, "tools": None, "prompt": None}, {"messages": SINGLE, "tools": None, "prompt": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    made: Source = TypeAdapter(Source).validate_python({"kind": "parquet", "paths": [f"{tmp_path}/a.parquet"]})
    assert list(read_examples(made)) == [Conversation(SINGLE, "")] * 2


def test_text_files_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    made: Source = TypeAdapter(Source).validate_python(
        {"kind": "text", "paths": [f"{tmp_path}/a.txt"], "document": "line"}
    )
    assert list(read_examples(made)) == [Text("one", ""), Text("two", "")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": SINGLE, "prompt": "a", "prompt_id": "x"}, "Conversation"),
        ({"messages": SINGLE, "text": "rendered"}, "Conversation"),
        ({"instruction": "a", "output": "b", "text": "rendered"}, "Conversation"),
    ],
)
def test_prompts_and_rendered_texts_beside_a_format_are_passed_over(tmp_path: Path, row: Any, name: str) -> None:
    assert type(read(tmp_path, row)[0]).__name__ == name


# ------------------------------------------------------------------------------- formats gone wrong


def test_mixed_formats_show_what_was_expected(tmp_path: Path) -> None:
    error = error_of(tmp_path, GOOD["messages"], GOOD["messages"], GOOD["alpaca"])
    assert error.message == "mixed formats: a record of format alpaca where messages is expected"
    assert error.remedy and "(as " in error.remedy and '{"messages": [{"role": "user"' in error.remedy
    assert "rows.jsonl:1 is)" in error.remedy
    error = error_of(tmp_path, GOOD["alpaca"], format="messages")
    assert error.remedy and "as the recipe says" in error.remedy


def test_a_missing_field_names_the_nearest(tmp_path: Path) -> None:
    error = error_of(
        tmp_path, GOOD["prompt_completion"], {"prompt": "a", "compleetion": "b"}, format="prompt_completion"
    )
    assert "no field 'completion'; fields there: prompt, compleetion; did you mean 'compleetion'?" in error.message
    error = error_of(tmp_path, {"mesages": []})
    assert "no known format has these fields: mesages; did you mean 'messages'?" in error.message
    assert error.remedy and "sharegpt: conversations" in error.remedy
    assert "no field 'b'" in error_of(tmp_path, {"x": 1}, format="text", columns={"text": "b"}).message


def test_fields_of_other_usual_names_are_told_the_columns(tmp_path: Path) -> None:
    dolly = {"instruction": "a", "context": "c", "response": "b"}
    error = error_of(tmp_path, dolly)
    assert error.message == "no known format has these fields: instruction, context, response"
    assert error.remedy and "by `columns: {output: response, input: context}` of this source" in error.remedy
    read(tmp_path, dolly, columns={"output": "response", "input": "context"})
    error = error_of(tmp_path, {"question": "a", "answer": "b"})
    assert error.remedy and "`columns: {instruction: question, output: answer}`" in error.remedy


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    row = {"q": "a", "a": "b", "reply": "c"}
    error = error_of(tmp_path, row, columns={"prompt": "question", "completion": "a"})
    assert "`columns` of the source names 'question' for 'prompt', and there is no such field" in error.message
    error = error_of(tmp_path, row, columns={"prompt": "q", "completion": "repl"})
    assert "'repl' for 'completion'" in error.message and "did you mean 'reply'?" in error.message
    # What is optional may be missing from a line, but not from a table.
    alpaca, columns = {"instruction": "a", "output": "b"}, {"input": "context"}
    assert read(tmp_path, alpaca, columns=columns)
    pq.write_table(pa.Table.from_pylist([alpaca]), tmp_path / "a.parquet")
    made: Source = TypeAdapter(Source).validate_python(
        {"kind": "parquet", "paths": [f"{tmp_path}/a.parquet"], "columns": columns, "format": "alpaca"}
    )
    with pytest.raises(InputError, match="names 'context' for 'input', and there is no such field"):
        list(read_examples(made))


def test_two_formats_at_once_are_not_guessed(tmp_path: Path) -> None:
    row = {"messages": SINGLE, "chosen": "a", "rejected": "b"}
    error = error_of(tmp_path, row)
    assert "may be of format messages or preference" in error.message
    assert read(tmp_path, row, format="messages")


def test_labelled_completions_are_not_all_imitated(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": False}
    assert read(tmp_path, row) == [Labelled("a", "b", False, "")]
    assert read(tmp_path, row, format="prompt_completion") == [PromptCompletion("a", "b", "")]
    assert read(tmp_path, row | {"label": "fiction"}) == [PromptCompletion("a", "b", "")]


@pytest.mark.parametrize("label", [0, 1, "good", 0.5])
def test_labels_that_are_no_booleans_where_labelled_answers_are_wanted(tmp_path: Path, label: Any) -> None:
    rows = [GOOD["labelled"] | {"label": label}, GOOD["labelled"]]
    with pytest.raises(InputError, match=rf"rows.jsonl:1: label is .*\({label!r}\), not true or false") as told:
        list(read_examples(source(tmp_path, rows), labelled=True))
    assert told.value.remedy == "write true for a good answer, false for a bad one"
    assert len(list(read_examples(source(tmp_path, rows[1:]), labelled=True))) == 1


@pytest.mark.parametrize("margin", ["1", True, math.nan, math.inf, 1e300, 10**400])
def test_margins_are_numbers(tmp_path: Path, margin: Any) -> None:
    error = error_of(tmp_path, GOOD["preference"] | {"margin": margin})
    assert error.message.startswith("margin is ") and error.message.endswith("not a number from -1e+06 to 1e+06")


@pytest.mark.parametrize("rank", ["1", True, None, 0, 1.5, 2**24, 10**400])
def test_ranks_are_whole_numbers(tmp_path: Path, rank: Any) -> None:
    error = error_of(tmp_path, GOOD["ranking"] | {"ranks": [1, rank]})
    assert error.message.startswith("ranks[1] is ") and "not a whole number from 1 to 1,000,000" in error.message


# -------------------------------------------------------------------------------------- bad rows
# The kinds of bad rows that issue 4 lists; broken JSON and wrong encoding once more in test_records.py,
# a template that lacks a role in test_chat.py, too long rows in the tests of packing.


def test_broken_json(tmp_path: Path) -> None:
    assert error_of(tmp_path, GOOD["messages"], '{"messages": [{"ro').message.startswith("not JSON: ")


def test_invalid_utf8(tmp_path: Path) -> None:
    made = source(tmp_path, [GOOD["messages"]])
    with open(tmp_path / "rows.jsonl", "ab") as file:
        file.write(b'{"messages": "\xff"}\n')
    with pytest.raises(InputError, match="rows.jsonl:2: not UTF-8: byte 0xff at byte offset"):
        list(read_examples(made))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [user("a"), user("b"), assistant("c")],
            "messages[1]: wrong order of roles: a user turn after a user turn; expected: assistant",
        ),
        (
            [user("a"), assistant("b"), assistant("c")],
            "messages[2]: wrong order of roles: an assistant turn after an assistant turn; expected: user or tool",
        ),
        (
            [assistant("a"), user("b")],
            "messages[0]: wrong order of roles: the conversation begins with an assistant turn",
        ),
        ([tool("a"), assistant("b")], "messages[0]: wrong order of roles: the conversation begins with a tool turn"),
        (
            [user("a"), system("b"), assistant("c")],
            "messages[1]: wrong order of roles: a system message stands first or",
        ),
        ([system("a"), system("b"), user("c"), assistant("d")], "messages[1]: wrong order of roles: a system message"),
        ([system("a"), assistant("b")], "an assistant turn after a system turn; expected: user"),
        ([user("a"), tool("b"), assistant("c")], "messages[1]: wrong order of roles: a tool turn after a user turn"),
    ],
)
def test_wrong_order_of_roles(tmp_path: Path, messages: Any, message: str) -> None:
    error = error_of(tmp_path, {"messages": messages})
    assert message in error.message
    assert error.remedy and "(system,) user, assistant" in error.remedy


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}, assistant("b")]}, "messages[0] has no 'content'; there: role"),
        (
            {"messages": [user("a"), {"rolle": "assistant", "content": "b"}]},
            "messages[1] has no 'role'; there: rolle, content; did you mean 'rolle'?",
        ),
        ({"conversations": [{"from": "human", "text": "a"}]}, "conversations[0] has no 'value'"),
        ({"instruction": "a", "output": None}, "no known format has these fields: instruction"),
    ],
)
def test_missing_fields(tmp_path: Path, row: Any, message: str) -> None:
    assert message in error_of(tmp_path, row).message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user(""), assistant("b")]}, "messages[0].content is empty"),
        ({"messages": [user("a"), assistant(" \n")]}, "messages[1].content is empty"),
        ({"messages": [user("a"), assistant("", tool_calls=[])]}, "messages[1].content is empty"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": [{"from": "human", "value": ""}]}, "conversations[0].value is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"text": ""}, "text is empty"),
        ({"prompt": "a", "completions": ["b", ""], "labels": [True, True]}, "completions[1] is empty"),
    ],
)
def test_empty_content(tmp_path: Path, row: Any, message: str) -> None:
    assert message in error_of(tmp_path, row).message


@pytest.mark.parametrize(
    ("role", "hint"),
    [("asistant", "; did you mean 'assistant'?"), ("gpt", "; did you mean 'assistant'?"), ("xyz", ""), (3, "")],
)
def test_unknown_role(tmp_path: Path, role: Any, hint: str) -> None:
    error = error_of(tmp_path, {"messages": [user("a"), {"role": role, "content": "b"}]})
    assert error.message == f"messages[1]: unknown role {role!r}{hint}"
    assert error.remedy == "roles are system, user, assistant, tool"


def test_unknown_speaker_of_sharegpt(tmp_path: Path) -> None:
    error = error_of(tmp_path, {"conversations": [{"from": "humann", "value": "a"}]})
    assert "conversations[0]: unknown role 'humann'; did you mean 'human'?" in error.message
    error = error_of(tmp_path, {"conversations": SINGLE})
    assert error.remedy == "set `columns: {messages: conversations}` on this source"
    assert read(tmp_path, {"conversations": SINGLE}, columns={"messages": "conversations"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user("a"), {"role": "assistant", "content": 4}]},
            "messages[1].content is a number (4), not a string",
        ),
        (
            {"messages": [user("a"), {"role": "assistant", "content": {"a": 1}}]},
            "messages[1].content is an object, not a",
        ),
        ({"messages": [user("a"), {"role": "assistant", "content": True}]}, "messages[1].content is a boolean (True)"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0] is of type 'image'"),
        ({"messages": "a"}, "messages is a string, not an array of messages"),
        ({"messages": ["a"]}, "messages[0] is a string, not an object"),
        (
            {"conversations": [{"from": "human", "value": 1.5}]},
            "conversations[0].value is a number (1.5), not a string",
        ),
        ({"prompt": 1, "completion": "b"}, "prompt is a number (1), not a string"),
        ({"text": ["a"]}, "text is an array, not a string"),
        ({"prompt": "a", "completions": "b", "labels": [True]}, "completions is a string, not an array"),
        ({"prompt": "a", "completions": ["b"], "labels": [1]}, "labels[0] is a number (1), not true or false"),
        ({"prompt": "a", "completions": ["b"], "labels": []}, "1 completions with 0 labels"),
        ({"prompt": SINGLE[:1], "completion": "b"}, "prompt is messages, completion is a string"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history[0] is no pair"),
        ({"messages": SINGLE, "tools": "[{"}, "tools is a string that is not JSON"),
        ({"messages": SINGLE, "tools": {"name": "a"}}, "tools is an object, not an array of objects"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool_calls[0] names no"),
        ({"conversations": [TURNS[0], {"from": "function_call", "value": "a"}]}, "a function call that is not JSON"),
        ({"conversations": [TURNS[0], {"from": "function_call", "value": "{}"}]}, "a function call without a name"),
    ],
)
def test_values_of_other_types(tmp_path: Path, row: Any, message: str) -> None:
    assert message in error_of(tmp_path, row).message


def test_only_a_system_message(tmp_path: Path) -> None:
    assert error_of(tmp_path, {"messages": [system("a")]}).message == "messages has only a system message"
    error = error_of(tmp_path, {"conversations": [{"from": "system", "value": "a"}]})
    assert error.message == "conversations has only a system message"


def test_no_assistant_turn(tmp_path: Path) -> None:
    message = "messages has no assistant turn, so there is nothing to learn in it"
    assert error_of(tmp_path, {"messages": [system("a"), user("b")]}).message == message


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    rows = [{"id": key, "text": f"text {number}"} for number, key in enumerate(["a", 1, "b", None, None, "1", "b"])]
    assert len(read(tmp_path, *rows[:-1])) == 6
    error = error_of(tmp_path, *rows)
    assert error.message == f"id 'b' is there twice; first at {tmp_path}/rows.jsonl:3"
    renamed = [{"key": row["id"], "text": row["text"]} for row in rows]
    assert len(read(tmp_path, *renamed)) == 7
    assert "id 'b' is there twice" in error_of(tmp_path, *renamed, columns={"id": "key"}).message
    assert error.remedy and "`columns: {id: other_field}`" in error.remedy and "remove it" in error.remedy


def test_a_boolean_is_no_id(tmp_path: Path) -> None:
    rows = [{"id": key, "text": f"text {number}"} for number, key in enumerate([True, True, 1, False, 0, 1])]
    assert len(read(tmp_path, *rows[:-1])) == 5
    assert error_of(tmp_path, *rows).message == f"id 1 is there twice; first at {tmp_path}/rows.jsonl:3"


def test_prompts_end_with_a_question(tmp_path: Path) -> None:
    error = error_of(tmp_path, {"prompt": SINGLE, "completion": [assistant("c")]})
    assert error.message == "prompt ends with an assistant turn; a prompt ends with a user or tool turn"
    error = error_of(tmp_path, {"prompt": SINGLE[:1], "completion": [user("c")]})
    assert "completion[0]: wrong order of roles: a user turn after a user turn" in error.message


def test_a_system_message_in_two_places(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "x"}, *TURNS]
    assert "a system message twice" in error_of(tmp_path, {"conversations": turns, "system": "y"}).message
