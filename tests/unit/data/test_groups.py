"""Answers that were judged, as one document a group: what is its prompt, what is each answer, what is left out."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.chat_template_files import named
from llmtrain.data.examples import Conversation, Example, Labelled, Preference, PromptCompletion, Ranking, Stepwise
from llmtrain.data.groups import AnswerEncoder, Judged, Wanted
from llmtrain.errors import InputError
from llmtrain.recipe.schema import JSONLSource
from tests.chats import write_jsonl
from tests.unit.data.chats import assistant, chat_tokenizer, data, encoder, user

TOKENIZER = chat_tokenizer(named("chatml"))
W = "rows.jsonl:1"
ASKED = [user("Hi"), assistant("Hello"), user("What is 2 + 2?")]


def judged(wanted: Wanted = "compared", separator: str | None = None) -> Judged:
    return Judged(TOKENIZER, data(), wanted, separator)


def parts(tokens: Any) -> list[str]:
    """The text of the prompt and of each answer; what is learnt of it in brackets."""
    numbers = sorted({mark >> 1 for mark in tokens.trained})
    shown = []
    for number in [0, *(n for n in numbers if n)]:
        text = ""
        for token, mark in zip(tokens.ids, tokens.trained, strict=True):
            if mark >> 1 == number:
                piece = TOKENIZER.decode([token])
                text += f"[{piece}]" if mark & 1 else piece
        shown.append(text.replace("][", ""))
    return shown


def test_a_preference_is_its_prompt_and_what_each_answer_adds() -> None:
    example = Preference(ASKED, [assistant("Four.")], [assistant("Five.")], W, margin=0.5)
    (tokens,) = judged().encode([example])
    prompt, better, worse = parts(tokens)
    assert prompt.endswith("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n") and "Hello" in prompt
    assert better == "[Four.<|im_end|>]\n" and worse == "[Five.<|im_end|>]\n"
    assert tokens.values == [(1.0, 0.5), (2.0, 0.0)]


@pytest.mark.parametrize("answer", ["Four.", "  spaces  ", "Fo", "😀"])
def test_each_answer_with_the_prompt_is_what_fine_tuning_sees(answer: str) -> None:
    (tokens,) = judged().encode([Preference(ASKED, [assistant(answer)], [assistant("Four, I think.")], W)])
    whole = encoder(TOKENIZER).encode([Conversation([*ASKED, assistant(answer)], W, num_prompt=len(ASKED))])[0]
    mine = [index for index, mark in enumerate(tokens.trained) if mark >> 1 in (0, 1)]
    assert [tokens.ids[index] for index in mine] == whole.ids
    assert [bool(tokens.trained[index] & 1) for index in mine] == list(whole.trained)


def test_a_ranking_is_in_the_order_of_its_ranks() -> None:
    example = Ranking("2 + 2 =", [" 5", " 4", " four"], [2, 1, 1], W)
    (tokens,) = judged().encode([example])
    assert [part.strip("[]") for part in parts(tokens)[1:]] == [f"{x}<|endoftext|>" for x in (" 4", " four", " 5")]
    assert [value[0] for value in tokens.values] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 1 + 1? A: two", "Q: 1 + 1? A: three", "<bos>Q: 1 + 1? A:"),
        ("same start", "same", ""),
        ("begin one", "begin other", "<bos>begin"),
        ("no", "yes", ""),
    ],
)
def test_without_a_prompt_it_is_what_the_texts_begin_with(chosen: str, rejected: str, prompt: str) -> None:
    (tokens,) = judged().encode([Preference(None, chosen, rejected, W)])
    first, better, worse = (part.replace("[", "").replace("]", "") for part in parts(tokens))
    ends = (f"{chosen}<|endoftext|>", f"{rejected}<|endoftext|>")
    assert (f"{first}{better}", f"{first}{worse}") == tuple(f"<bos>{end}" for end in ends)
    assert first == prompt


def test_without_a_prompt_it_is_the_messages_that_both_begin_with() -> None:
    both = Preference(None, [*ASKED, assistant("Four.")], [*ASKED, assistant("Five.")], W)
    given = Preference(ASKED, [assistant("Four.")], [assistant("Five.")], W)
    assert judged().encode([both]) == judged().encode([given])


@pytest.mark.parametrize(
    ("example", "why"),
    [
        (Preference("a", "b ", " b", W), "their chosen and rejected answers are equal"),
        (Preference(ASKED, [assistant("x")], [assistant("x")], W), "their chosen and rejected answers are equal"),
        (
            Preference(ASKED, [assistant("x")], [{**assistant("x"), "name": "y"}], W),
            "two of their answers are the same",
        ),
        (Ranking("a", ["b"], [1], W), "they have a single answer"),
        (Ranking("a", ["b", "c"], [2, 2], W), "all of their answers have the same rank"),
        (Ranking("a", ["b", "c", "b"], [1, 2, 3], W), "they have an answer twice"),
    ],
)
def test_what_teaches_nothing_is_left_out_with_its_reason(example: Example, why: str) -> None:
    good = Preference("a", "b", "c", W)
    (tokens, after) = judged().encode([example, good])
    assert tokens.ids == [] and tokens.why.startswith(why)
    assert after.ids


def test_a_pair_of_equal_answers_is_not_both_good_and_bad() -> None:
    (tokens,) = judged("labelled").encode([Preference("a", "b", " b", W)])
    assert (tokens.ids, tokens.why) == ([], "their chosen and rejected answers are equal")


@pytest.mark.parametrize(
    ("wanted", "example", "message"),
    [
        ("compared", PromptCompletion("a", "b", W), "learns from answers that were compared.*this is a prompt with a"),
        ("compared", Labelled("a", "b", True, W), "this is a labelled answer"),
        ("labelled", Ranking("a", ["b", "c"], [1, 2], W), "learns from answers that are good or bad"),
        ("steps", Preference("a", "b", "c", W), "learns from answers in steps"),
    ],
)
def test_other_formats_are_refused_with_their_place(wanted: Wanted, example: Example, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        judged(wanted, "\n").encode([example])
    assert caught.value.where == W


def test_steps_are_judged_at_the_last_token_of_their_separator() -> None:
    for prompt in ("1 + 2 + 3 =", ASKED):
        example = Stepwise(prompt, ["1 + 2 = 3", "3 + 3 = 7", "so 7"], [True, False, False], W)
        (tokens,) = judged("steps", "\n").encode([example])
        ends = [index for index, mark in enumerate(tokens.trained) if mark == 3]
        texts = [TOKENIZER.decode(tokens.ids[: end + 1]) for end in ends]
        assert [text.rpartition("1 + 2 = 3")[2] for text in texts] == [
            "\n",
            "\n3 + 3 = 7\n",
            "\n3 + 3 = 7\nso 7\n",
        ]
        assert [value[0] for value in tokens.values] == [1.0, 0.0, 0.0]
        assert AnswerEncoder(TOKENIZER, "\n").steps(prompt, example.completions, W) == (tokens.ids, ends)


def test_steps_that_a_template_trims_and_that_end_in_a_character_of_several_tokens() -> None:
    tokenizer = chat_tokenizer(named("chatml").replace("{{- message.content }}", "{{- message.content | trim }}"))
    example = Stepwise([user("Halve 1 and 3.")], [" 1 / 2 = ½", "3 / 2 = 1½"], [True, True], W)
    assert len(tokenizer.encode("½", add_special_tokens=False)) > 1
    (tokens,) = Judged(tokenizer, data(), "steps", "\n").encode([example])
    ends = [index for index, mark in enumerate(tokens.trained) if mark == 3]
    first, second = (tokenizer.decode(tokens.ids[: end + 1]) for end in ends)
    assert first.endswith("assistant\n1 / 2 = ½\n") and second.endswith("½\n3 / 2 = 1½")


def test_all_answers_to_a_prompt_are_in_one_half(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "chosen": f" It is {n}", "rejected": f" Not {n}"} for n in range(20)]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, *({**row, "rejected": " No idea"} for row in rows)])
    source = JSONLSource(kind="jsonl", paths=[str(file)])
    for wanted in ("compared", "labelled"):
        made = judged(wanted)
        halved_by: dict[str, set[str]] = {}
        for example in made.read(source):
            halved_by.setdefault(str(example.prompt), set()).add(made.halved_by(example))
        assert len(halved_by) == 20 and all(len(keys) == 1 for keys in halved_by.values())
        assert len({key for keys in halved_by.values() for key in keys}) == 20


def test_an_answer_is_asked_about_as_it_was_learnt() -> None:
    for prompt, answer in ((ASKED, [assistant("Four.")]), ("2 + 2 =", " 4")):
        other: Any = [assistant("Five.")] if isinstance(answer, list) else " 5"
        (tokens,) = judged().encode([Preference(prompt, answer, other, W)])
        mine = [token for token, mark in zip(tokens.ids, tokens.trained, strict=True) if mark >> 1 in (0, 1)]
        text = answer if isinstance(answer, str) else answer[0]["content"]
        assert AnswerEncoder(TOKENIZER).answer(prompt, text, W) == mine
