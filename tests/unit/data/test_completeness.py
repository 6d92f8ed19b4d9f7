"""A template that leaves out or changes something of a record is refused, whatever is trained."""

from typing import Any

import pytest

from llmtrain.data.chat_template_files import named
from tests.unit.data.chats import (
    CALLING,
    MULTI,
    SINGLE,
    TOOLS,
    WEATHER,
    Message,
    assistant,
    chat_tokenizer,
    conversation,
    encoder,
    tool,
    trained_text,
    user,
)
from tests.unit.data.test_chat import ENCODERS, TOKENIZER, refused

CHATML = named("chatml")
THINKING = [
    user("Hi"),
    assistant("Hello.", reasoning_content="first thought"),
    user("So?"),
    assistant("Well.", reasoning_content="second thought"),
]
# As Qwen3's own: reasoning of turns before the last question goes; marked here, so that masks are no matter.
FORGETFUL = (
    "{% set last = namespace(question=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set last.question = messages.index(m) %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1]"
    " if '</think>' in m.content else '') %}"
    "{% if loop.index0 > last.question and thought %}<think>{{ thought }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def both_refuse(messages: list[Message], template: str, **more: Any) -> str:
    """The message that is the same whether turns or everything is trained."""
    tokenizer = chat_tokenizer(template)
    errors = {refused(messages, tokenizer, train_on=wanted, **more).message for wanted in ("assistant", "all")}
    (message,) = errors
    return message


# ----------------------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_is_not_written_is_missed(key: str) -> None:
    messages = [user("Hi"), assistant("Hello.", **{key: "a secret"})]
    assert f"leaves out messages[1].{key}: 'a secret'" in both_refuse(messages, CHATML)
    # A template that knows no reasoning is not one that forgets that of earlier turns.
    assert f"leaves out messages[1].{key}" in both_refuse([*messages, *SINGLE], CHATML)


def test_reasoning_that_is_written_is_trained() -> None:
    text = trained_text(TOKENIZER, ENCODERS["qwen3"].encode([conversation(THINKING)])[0])
    assert "first thought" in text and "second thought" in text


def test_reasoning_of_earlier_turns_may_be_dropped_by_a_template_that_writes_the_last() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    inline = [user("Hi"), assistant("<think>first</think>Hello."), user("So?"), assistant("<think>second</think>Well.")]
    twice = [{**message, "reasoning": message["reasoning_content"]} for message in THINKING[1::2]]
    for messages in (THINKING, inline, [THINKING[0], twice[0], THINKING[2], twice[1]]):
        text = trained_text(tokenizer, encoder(tokenizer).encode([conversation(messages)])[0])
        assert "first" not in text and "second" in text and "Hello." in text
    # Words before the reasoning are no reasoning.
    inline[1] = assistant("Words. <think>first</think>Hello.")
    assert "leaves out messages[1], an assistant message" in both_refuse(inline, FORGETFUL)
    ignorant = FORGETFUL.replace("loop.index0 > last.question and thought", "false")
    assert "leaves out messages[1].reasoning_content" in both_refuse(THINKING, ignorant)


@pytest.mark.parametrize(
    ("content", "lost"),
    [
        ("yes </think> hidden? </think> end", "hidden?"),
        ("before <think>a</think> after", "before"),
        ("<think>a</think> b <think>c</think> d", "b"),
    ],
)
def test_stray_tags_of_reasoning_lose_no_text(content: str, lost: str) -> None:
    message = refused([user("Hi"), assistant(content)], chat_template="qwen3").message
    assert f"leaves out messages[1], an assistant message, or changes it: {lost!r}" in message
    text = trained_text(TOKENIZER, ENCODERS["chatml"].encode([conversation([user("Hi"), assistant(content)])])[0])
    assert text == content + "<|im_end|>"


# ---------------------------------------------------------------------------------- tools and content


def test_results_of_tools_that_are_not_written_are_missed() -> None:
    silent = CHATML.replace(
        "{%- for message in messages %}", "{%- for message in messages if message.role != 'tool' %}"
    )
    # "sunny" stands in the answer, too: that does not stand for the result.
    messages = [*CALLING[:2], tool("sunny"), assistant("It is sunny.")]
    assert "leaves out messages[3]" in both_refuse(messages, silent, tools=TOOLS)
    messages[2] = tool("Result 42")
    assert "leaves out messages[2], a tool message" in both_refuse(messages, silent, tools=TOOLS)
    messages = [*CALLING[:2], tool("fine"), tool("fine"), assistant("Good.")]
    once = CHATML.replace(
        "{%- elif not (tools",
        "{%- elif message.role == 'tool' and loop.previtem.role == 'tool' %}{%- elif not (tools",
    )
    assert "leaves out messages[3], a tool message" in both_refuse(messages, once, tools=TOOLS)


def test_results_of_tools_may_be_written_as_json() -> None:
    template = CHATML.replace(
        "message.role + '\\n' + message.content",
        "message.role + '\\n' + (message.content | tojson if message.role == 'tool' else message.content)",
    )
    assert template != CHATML
    tokenizer = chat_tokenizer(template)
    messages = [*CALLING[:2], tool('{"sky": "clear"}\nwarm'), assistant("It is sunny.")]
    text = tokenizer.decode(encoder(tokenizer).encode([conversation(messages, tools=TOOLS)])[0].ids)
    assert r"{\"sky\": \"clear\"}\nwarm" in text


def test_arguments_and_words_beside_calls_are_missed() -> None:
    no_arguments = CHATML.replace("function.arguments | tojson", "'{}'")
    message = both_refuse(CALLING, no_arguments, tools=TOOLS)
    assert "leaves out arguments of the call of 'weather' in messages[1]: 'city'" in message
    no_words = CHATML.replace("{%- if message.content %}{{-", "{%- if not message.tool_calls %}{{-")
    messages = [user("Weather?"), assistant("Let me see.", tool_calls=[WEATHER])]
    assert "leaves out messages[1], an assistant message" in both_refuse(messages, no_words, tools=TOOLS)
    assert encoder(chat_tokenizer(no_words)).encode([conversation(CALLING, tools=TOOLS)])


@pytest.mark.parametrize("arguments", [{"where": 'Köln "x"\n', "n": [1, {"k": "v"}]}, '{"where": "K\\u00f6ln\\/x"}'])
def test_arguments_are_found_in_json(arguments: Any) -> None:
    messages = [user("Weather?"), assistant("", tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])]
    assert all(ENCODERS[name].encode([conversation(messages)]) for name in ("chatml", "qwen3"))


def test_no_arguments_need_not_be_written() -> None:
    """{} stands in the tools and in the answer, but a template in XML, say, writes nothing for it."""
    template = CHATML.replace("{{- function.arguments }}", "").replace("function.arguments | tojson", "''")
    call = {"function": {"name": "weather", "arguments": "{}"}}
    messages = [user("Weather?"), assistant("", tool_calls=[call]), tool("sunny"), assistant("It is sunny {} there.")]
    assert encoder(chat_tokenizer(template)).encode([conversation(messages, tools=TOOLS)])


def test_content_that_is_changed_is_missed() -> None:
    for change in ("upper", "replace('a', '')", "truncate(8)"):
        for role in ("assistant", "user"):
            body = f"(message.content | {change} if message.role == '{role}' else message.content)"
            template = CHATML.replace("{{- message.content }}", f"{{{{- {body} }}}}").replace(
                "'\\n' + message.content", f"'\\n' + {body}"
            )
            message = both_refuse([user("a banana or two?"), assistant("a banana, of course.")], template)
            assert f"{role} message, or changes it: 'a banana" in message


def test_white_space_around_content_is_the_templates_own() -> None:
    trimming = CHATML.replace("{{- message.content }}", "{{- message.content | trim }}")
    tokenizer = chat_tokenizer(trimming)
    assert trained_text(tokenizer, encoder(tokenizer).encode([conversation(MULTI)])[0]).endswith("Good<|im_end|>")


# ---------------------------------------------------------------------------------------------- marks


def test_each_turn_has_marks_of_its_own() -> None:
    """Not only the last, in which the earlier answer stands as well."""
    last_only = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    tokenizer = chat_tokenizer(last_only)
    messages = [user("Hi"), assistant("yes"), user("Sure?"), assistant("yes, yes")]
    assert "its marks are not around what messages[3] says" in refused(messages, tokenizer).message
    last = encoder(tokenizer, train_on="last_assistant").encode([conversation(messages)])[0]
    assert trained_text(tokenizer, last) == "yes, yes<|im_end|>"


def test_a_turn_may_have_several_marks() -> None:
    template = CHATML.replace("{{- '<|im_end|>' }}", "{%- endgeneration %}{%- generation %}{{- '<|im_end|>' }}", 1)
    tokenizer = chat_tokenizer(template)
    row = conversation(CALLING, tools=TOOLS)
    assert encoder(tokenizer).encode([row]) == ENCODERS["chatml"].encode([row])
