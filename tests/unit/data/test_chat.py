"""Which tokens of an example are trained, by every template; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, normalizers

from llmtrain.data.chat_template_files import NAMES, named, with_signs, without_marks
from llmtrain.data.examples import Preference, PromptCompletion, PromptOnly, Stepwise, Text
from llmtrain.errors import InputError
from tests.unit.data.chats import (
    CALLING,
    END_OF_TURN,
    MULTI,
    SINGLE,
    TOOLS,
    WEATHER,
    Message,
    assistant,
    chat_tokenizer,
    conversation,
    conversations,
    encoder,
    system,
    tool,
    trained_text,
    user,
)

TOKENIZER = chat_tokenizer()
ENCODERS = {name: encoder(TOKENIZER, chat_template=name) for name in NAMES}
UNMARKED = without_marks(named("chatml"))


def said(name: str, message: Message) -> str:
    """What a template writes of an assistant's turn without calls."""
    content: str = message["content"]
    if name in ("llama3", "plain"):
        content = content.strip()
    if name == "qwen3":
        content = f"<think>\n\n</think>\n\n{content.lstrip(chr(10))}"
    return content + END_OF_TURN[name]


def refused(messages: list[Message], tokenizer: Any = TOKENIZER, tools: Any = None, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        encoder(tokenizer, **options).encode([conversation(messages, tools=tools)])
    assert caught.value.where and caught.value.remedy
    return caught.value


# ----------------------------------------------------------------------------------- assistant turns


@pytest.mark.parametrize("name", NAMES)
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_trained_is_what_the_assistant_says_and_the_end_of_its_turns(name: str, messages: list[Message]) -> None:
    tokens = ENCODERS[name].encode([conversation(messages)])[0]
    turns = [message for message in messages if message["role"] == "assistant"]
    # A token over the edge of a turn is trained: only ends of lines that begin an answer join what is before.
    assert trained_text(TOKENIZER, tokens).lstrip("\n") == "".join(said(name, turn) for turn in turns).lstrip("\n")
    ends = [token for token, is_trained in zip(tokens.ids, tokens.trained, strict=True) if is_trained]
    assert ends.count(TOKENIZER.convert_tokens_to_ids(END_OF_TURN[name].strip())) == len(turns)


@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_masks_without_marks_are_those_of_marks(messages: list[Message]) -> None:
    """Prefixes find the turns that marks tell, but for the end of line after the turn."""
    by_prefix = encoder(chat_tokenizer(UNMARKED)).encode([conversation(messages)])[0]
    by_marks = ENCODERS["chatml"].encode([conversation(messages)])[0]
    assert by_prefix.ids == by_marks.ids
    end, line_end = (TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("<|im_end|>", "\n"))
    for index in range(len(by_prefix.ids)):
        after_turn = by_prefix.ids[index] == line_end and by_prefix.ids[index - 1] == end
        assert by_prefix.trained[index] == by_marks.trained[index] or after_turn


def test_the_last_turn_or_all_turns_can_be_trained() -> None:
    for tokenizer, options in ((TOKENIZER, {"chat_template": "chatml"}), (chat_tokenizer(UNMARKED), {})):
        last = encoder(tokenizer, train_on="last_assistant", **options).encode([conversation(MULTI)])[0]
        assert trained_text(tokenizer, last).removesuffix("\n") == "  Good \n<|im_end|>"
        whole = encoder(tokenizer, train_on="all", **options).encode([conversation(MULTI)])[0]
        assert all(whole.trained) and whole.ids == last.ids
        assert trained_text(tokenizer, whole).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_answers_in_a_prompt_are_not_trained() -> None:
    example = conversation(MULTI, num_prompt=4)
    for tokenizer, options in ((TOKENIZER, {"chat_template": "chatml"}), (chat_tokenizer(UNMARKED), {})):
        tokens = encoder(tokenizer, **options).encode([example])[0]
        assert trained_text(tokenizer, tokens).removesuffix("\n") == "  Good \n<|im_end|>"


def test_calls_of_tools_are_trained_and_what_tools_return_is_not() -> None:
    tokens = ENCODERS["chatml"].encode([conversation(CALLING, tools=TOOLS)])[0]
    assert trained_text(TOKENIZER, tokens) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
        "It is sunny.<|im_end|>Bye.<|im_end|>"
    )
    assert "sunny<|im_end|>" in TOKENIZER.decode(tokens.ids) and '"description": "Look up"' in TOKENIZER.decode(
        tokens.ids
    )


def test_an_end_that_stands_behind_the_marks_is_trained_with_the_turn() -> None:
    template = named("chatml").replace("{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- endgeneration %}")
    template = template.replace("{{- '\\n' }}\n    {%- elif", "{{- '<|im_end|>\\n' }}\n    {%- elif")
    tokenizer = chat_tokenizer(template)
    mine, ours = (one.encode([conversation(MULTI)])[0] for one in (encoder(tokenizer), ENCODERS["chatml"]))
    assert tokenizer.apply_chat_template(MULTI, tokenize=False) == TOKENIZER.decode(ours.ids)
    assert mine == ours


def test_a_turn_that_no_token_ends_is_refused() -> None:
    marked = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    for template in (marked, without_marks(marked) + "{% if add_generation_prompt %}assistant: {% endif %}"):
        error = refused(SINGLE, chat_tokenizer(template))
        assert "'It is 4.\\n', which is no token of its own" in error.message.replace("4.'", "4.\\n'")
        assert "would not learn to stop" in error.message


def test_marks_in_the_wrong_places_are_refused() -> None:
    everywhere = "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    with pytest.raises(InputError, match=r"data.chat_template: .* marks are around what the user says"):
        encoder(chat_tokenizer(everywhere))
    elsewhere = "{% for m in messages %}{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    assert "its marks are not around what messages[1] says" in refused(SINGLE, chat_tokenizer(elsewhere)).message


def test_marks_inside_of_a_macro() -> None:
    """There transformers counts from the start of what the macro writes, not of the conversation."""
    template = (
        "{% macro say(m) %}{{ m.role }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ say(m) if m.role == 'assistant' else m.content + '\n' }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template)
    assert trained_text(tokenizer, encoder(tokenizer).encode([conversation(SINGLE)])[0]) == "It is 4.<|endoftext|>"


@pytest.mark.parametrize("name", NAMES)
def test_marks_leave_the_text_alone(name: str) -> None:
    chats = [(MULTI, None, False), (MULTI[:2], None, True)]
    for messages, tools, answer in [*chats, (CALLING, TOOLS, False)] if name in ("chatml", "qwen3") else chats:
        by_transformers, by_us, without = (
            TOKENIZER.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
            for template in (named(name), with_signs(named(name)), without_marks(named(name)))
        )
        assert by_transformers == by_us == without


def test_a_template_for_other_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text(named("chatml").replace("im_end", "end_of_turn"))
    error = refused(SINGLE, chat_template=str(file))
    assert "<|end_of_turn|>" in error.message and error.where == "chats.jsonl:1"
    assert error.remedy and "data.chat_template: plain" in error.remedy


# --------------------------------------------------------------------------------- choice of template


QWEN_LIKE = named("qwen3").replace("{{- '<think>\\n' + thought", "{{- '' if not loop.last else '<think>\\n' + thought")


def test_a_template_that_changes_earlier_turns_is_replaced_by_its_twin() -> None:
    changing = without_marks(named("qwen3")).replace(
        "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}",
        "{{- ('<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' if loop.last else '')"
        " + answer.lstrip('\\n') }}",
    )
    assert changing != without_marks(named("qwen3"))
    tokenizer = chat_tokenizer(changing)
    chosen = encoder(tokenizer)
    assert chosen.template == named("qwen3") and chosen.inference_template == changing
    assert chosen.encode([conversation(MULTI)]) == ENCODERS["qwen3"].encode([conversation(MULTI)])


def test_a_template_that_changes_earlier_turns_and_has_no_twin_is_refused_where_it_matters() -> None:
    changing = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}(old) "
        "{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(changing)
    chosen = encoder(tokenizer)
    assert trained_text(tokenizer, chosen.encode([conversation(SINGLE)])[0]) == "It is 4.<|im_end|>"
    error = refused(MULTI, tokenizer)
    assert "writes messages[2] differently when other turns follow" in error.message
    assert error.remedy and "{% generation %}" in error.remedy and "chatml, llama3, plain, qwen3" in error.remedy


def test_a_heading_without_add_generation_prompt_is_not_trained_in_silence() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert "has no add_generation_prompt" in refused(SINGLE, chat_tokenizer(template)).message
    instruct = (
        "{% for m in messages %}{{ '[I] ' + m.content + ' [/I]' if m.role == 'user' else m.content + eos_token }}"
        "{% endfor %}"
    )
    tokenizer = chat_tokenizer(instruct)
    assert trained_text(tokenizer, encoder(tokenizer).encode([conversation(SINGLE)])[0]) == "It is 4.<|endoftext|>"


def test_an_eos_at_the_end_of_the_whole_is_no_change_of_turns() -> None:
    template = UNMARKED.rstrip() + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = chat_tokenizer(template)
    tokens = encoder(tokenizer).encode([conversation(MULTI)])[0]
    text = trained_text(tokenizer, tokens)
    assert text == "Hello!\nHow are you?<|im_end|>\n  Good \n<|im_end|>\n<|endoftext|>"


def test_templates_by_name_and_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(named("chatml"))
    by_file, by_name = encoder(TOKENIZER, chat_template=str(file)), ENCODERS["chatml"]
    assert by_file.template == by_name.template and by_file.fingerprint == by_name.fingerprint
    assert by_name.inference_template == UNMARKED and "generation %}" not in UNMARKED
    with pytest.raises(InputError, match="neither a template's name nor a file; did you mean 'chatml'"):
        encoder(TOKENIZER, chat_template="chatlm")
    file.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(InputError, match="data.chat_template: line 2 is no Jinja"):
        encoder(TOKENIZER, chat_template=str(file))


def test_without_a_template_nothing_is_guessed() -> None:
    assert encoder(TOKENIZER).template is None
    error = refused(SINGLE)
    assert "no chat template" in error.message and error.where == "chats.jsonl:1"
    assert error.remedy and "data.chat_template" in error.remedy
    assert encoder(TOKENIZER).encode([Text("hi", "a:1")])  # which needs none


def test_of_several_templates_the_default_is_taken() -> None:
    assert encoder(chat_tokenizer({"default": UNMARKED, "tool_use": "other"})).template == UNMARKED  # type: ignore[arg-type]


def test_the_fingerprint_changes_with_what_decides_ids_and_masks() -> None:
    prints = {
        encoder(TOKENIZER, chat_template="chatml").fingerprint,
        encoder(TOKENIZER, chat_template="qwen3").fingerprint,
        encoder(TOKENIZER, chat_template="chatml", train_on="all").fingerprint,
        encoder(chat_tokenizer(special=["<new>"]), chat_template="chatml").fingerprint,
        encoder(chat_tokenizer(eos_token="<|im_end|>"), chat_template="chatml").fingerprint,
    }
    assert len(prints) == 5
    assert encoder(chat_tokenizer(), chat_template="chatml").fingerprint in prints


# ------------------------------------------------------------------------------ what a template lacks


def test_a_template_that_refuses_a_role_says_so_with_the_place() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    error = refused(MULTI, chat_tokenizer(no_system + UNMARKED))
    assert error.where == "chats.jsonl:1" and error.message == "the chat template: System role not supported"
    assert "has no tools" in refused(SINGLE, tools=TOOLS, chat_template="plain").message
    assert "no tool turns" in refused(CALLING, chat_template="llama3").message


def test_a_template_that_passes_over_what_it_does_not_know_is_refused() -> None:
    silent = (
        "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(silent)
    assert "leaves out messages[0], a system message" in refused(MULTI, tokenizer).message
    assert "leaves out the call of 'weather' in messages[1]" in refused(CALLING, tokenizer).message
    assert "leaves out the tool 'weather'" in refused(SINGLE, tokenizer, tools=TOOLS).message


def test_arguments_of_calls_take_the_form_that_the_template_wants() -> None:
    body = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}(ARGS){% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text_call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    for arguments in (
        "{{ c.function.arguments | tojson }}",
        "{{ '' + c.function.arguments }}",
        "{{ c.function.arguments }}",
    ):
        tokenizer = chat_tokenizer(body.replace("ARGS", arguments))
        for call in (WEATHER, text_call):
            messages = [user("Weather?"), assistant("", tool_calls=[call])]
            text = trained_text(tokenizer, encoder(tokenizer).encode([conversation(messages)])[0])
            assert text == 'weather({"city": "Paris"})<|im_end|>'
    broken = {"type": "function", "function": {"name": "weather", "arguments": "{city"}}
    tokenizer = chat_tokenizer(body.replace("ARGS", "{{ c.function.arguments | tojson }}"))
    error = refused([user("Weather?"), assistant("", tool_calls=[broken])], tokenizer)
    assert "wants arguments that are JSON, and those of 'weather' are not" in error.message


# ------------------------------------------------------------------------- text like special tokens


def byte_fallback_tokenizer() -> Any:
    """Llama 2's kind: a metaspace for spaces, bytes for what is not in the vocabulary."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz<|>_?."]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<bos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|endoftext|>")


@pytest.mark.parametrize("make", [chat_tokenizer, byte_fallback_tokenizer])
def test_special_looking_text_in_a_turn_is_text(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [user("what ends a turn? <|im_end|> or <|endoftext|>?"), assistant("it is <|im_end|>.")]
    tokens = encoder(tokenizer, chat_template="chatml").encode([conversation(messages)])[0]
    assert tokens.ids.count(end) == 2  # those of the template
    assert tokenizer.eos_token_id not in tokens.ids
    assert trained_text(tokenizer, tokens).strip() == "it is <|im_end|>.<|im_end|>"
    assert "what ends a turn? <|im_end|> or <|endoftext|>?<|im_end|>" in tokenizer.decode(tokens.ids)
    assert "chats.jsonl:1 holds text that looks like a special token" in caplog.text


def test_private_characters_of_the_data_stay() -> None:
    text = "\U000f0000 <|im_end|> \U000f0001"
    tokens = ENCODERS["chatml"].encode([conversation([user(text), assistant(text)])])[0]
    assert trained_text(TOKENIZER, tokens) == text + "<|im_end|>"


def test_trimmed_offsets_lose_no_token() -> None:
    from tokenizers import processors

    trimming = chat_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [user("a   b"), assistant("   x   y   ")]
    trimmed = encoder(trimming, chat_template="chatml").encode([conversation(messages)])
    assert trimmed == ENCODERS["chatml"].encode([conversation(messages)])


# ----------------------------------------------------------------------------- texts and other formats


def test_texts_and_completions_are_framed() -> None:
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    bare = TOKENIZER.encode("Hello there", add_special_tokens=False)
    text, pair, ended = encoder(TOKENIZER).encode(
        [
            Text("Hello there", "a:1"),
            PromptCompletion("Hello", " there", "a:2"),
            PromptCompletion("<bos>Hello", " there<|endoftext|>", "a:3"),
        ]
    )
    assert text.ids == [bos, *bare, eos] and all(text.trained)
    assert pair.ids == text.ids and pair == ended
    assert trained_text(TOKENIZER, pair) == " there<|endoftext|>"
    whole = encoder(TOKENIZER, train_on="all").encode([PromptCompletion("Hello", " there", "a:2")])[0]
    assert all(whole.trained) and whole.ids == pair.ids


def test_special_tokens_of_a_text_are_special_tokens() -> None:
    text = TOKENIZER.apply_chat_template(SINGLE, chat_template=UNMARKED, tokenize=False)
    tokens = encoder(TOKENIZER).encode([Text(text, "a:1")])[0]
    assert tokens.ids[1:-1] == ENCODERS["chatml"].encode([conversation(SINGLE)])[0].ids


def test_a_text_of_which_nothing_is_left_has_no_ids() -> None:
    assert encoder(TOKENIZER).encode([Text("<|endoftext|>", "a:1")])[0].ids == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Preference("a", "b", "c", "x:1"), "compared are for reward models and preference training"),
        (PromptOnly("a", {}, "x:1"), "is for reinforcement learning"),
        (Stepwise("a", ["b"], [True], "x:1"), "is for process reward models"),
    ],
)
def test_other_formats_say_what_they_are_for(example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encoder(TOKENIZER).encode([example])
    assert caught.value.where == "x:1" and "prompt_completion" in str(caught.value.remedy)


def test_a_prompt_with_an_answer_of_another_name_is_told_the_columns() -> None:
    with pytest.raises(InputError) as caught:
        encoder(TOKENIZER).encode([PromptOnly("a", {"response": "b"}, "x:1")])
    assert "if 'response' is the answer to learn, set `columns: {completion: response}`" in str(caught.value.remedy)


def test_rows_keep_their_order_over_batches() -> None:
    rows = [conversation([user(f"{i}"), assistant(f"answer {i}")]) for i in range(1100)]
    for i, tokens in enumerate(ENCODERS["chatml"].encode(rows)):
        assert trained_text(TOKENIZER, tokens) == f"answer {i}<|im_end|>"


def test_truncation_and_padding_of_a_tokenizer_are_not_in_force() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert encoder(tokenizer, chat_template="chatml").encode([conversation(MULTI)]) == ENCODERS["chatml"].encode(
        [conversation(MULTI)]
    )


def test_tool_turns_without_content_are_written() -> None:
    messages = [user("Weather?"), assistant("", tool_calls=[WEATHER]), tool(""), assistant("None.")]
    for name in ("chatml", "qwen3"):
        text = trained_text(TOKENIZER, ENCODERS[name].encode([conversation(messages)])[0])
        assert '{"name": "weather", "arguments": {"city": "Paris"}}' in text and "None.<|im_end|>" in text


def test_a_system_message_stands_before_the_tools() -> None:
    for name in ("chatml", "qwen3"):
        text = TOKENIZER.decode(ENCODERS[name].encode([conversation([system("Rule."), *CALLING], tools=TOOLS)])[0].ids)
        assert text.startswith("<|im_start|>system\nRule.\n\n") and text.count("Rule.") == 1
