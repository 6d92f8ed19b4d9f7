"""Answers that were judged, as one document a group: what is its prompt, what is each answer, what is left out."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.chat_template_files import named
from llmtrain.data.examples import Conversation, Example, Labelled, Preference, PromptCompletion, Ranking, Stepwise
from llmtrain.data.groups import AnswerEncoder, Judged, Wanted
from llmtrain.errors import InputError
from llmtrain.evaluation.judging import Answer, Judge
from llmtrain.recipe.schema import JSONLSource
from tests.chats import write_jsonl
from tests.unit.data.chats import assistant, chat_tokenizer, data, encoder, system, user
from tests.unit.search.graders import HandScorer

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
        (
            Preference(None, [user("a"), assistant("b")], [user("c"), assistant("d")], W),
            "their answers have no prompt in common",
        ),
        (
            Preference(None, [system("s"), user("a"), assistant("b")], [system("s"), user("c"), assistant("d")], W),
            "their answers have no prompt in common",
        ),
        (
            Ranking(None, [[user("a"), assistant("b")], [user("c"), assistant("d")]], [1, 2], W),
            "their answers have no prompt in common",
        ),
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


def test_conversations_that_differ_before_their_last_turns_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parted = {
        "chosen": [user("Hi"), assistant("Hello"), user("What?"), assistant("b")],
        "rejected": [user("Hi"), assistant("Hello!"), user("What?"), assistant("c")],
    }
    usual = {"chosen": [*ASKED, assistant("b")], "rejected": [*ASKED, assistant("c")]}
    file = write_jsonl(tmp_path / "rows.jsonl", [usual, parted, parted])
    source = JSONLSource(kind="jsonl", paths=[str(file)])
    for wanted in ("compared", "labelled"):
        caplog.clear()
        made = judged(wanted)
        tokens = made.encode(list(made.read(source)))
        assert caplog.text.count("the conversations differ before their last turns") == 1
        assert "rows.jsonl:2: " in caplog.text and "the 1 messages that they begin with" in caplog.text
        prompt, better = parts(tokens[-2 if wanted == "labelled" else -1])[:2]
        assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert better.startswith("[Hello<|im_end|>]\n<|im_start|>user\nWhat?") and better.endswith("[b<|im_end|>]\n")


def test_pairs_without_a_prompt_are_left_out_where_one_is_needed(tmp_path: Path) -> None:
    rows = [{"chosen": "Yes indeed", "rejected": "No"}, {"chosen": "Is it? Yes", "rejected": "Is it? No"}]
    made = judged("labelled")
    examples = list(made.read(JSONLSource(kind="jsonl", paths=[str(write_jsonl(tmp_path / "rows.jsonl", rows))])))
    left_out, *others = made.encode(examples)
    assert (left_out.ids, left_out.why) == ([], "their answers have no prompt in common")
    assert [tokens.values for tokens in others] == [[(0.0, 0.0)], [(1.0, 0.0)]]


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


def test_spaces_that_a_template_trims_are_not_looked_for_in_a_later_step() -> None:
    tokenizer = chat_tokenizer(named("chatml").replace("{{- message.content }}", "{{- message.content | trim }}"))
    (tokens,) = Judged(tokenizer, data(), "steps", "\n").encode(
        [Stepwise([user("Go.")], [" up", " up", " down"], [True, True, True], W)]
    )
    ends = [index for index, mark in enumerate(tokens.trained) if mark == 3]
    texts = [tokenizer.decode(tokens.ids[: end + 1]).rpartition("assistant\n")[2] for end in ends]
    assert texts == ["up\n", "up\n up\n", "up\n up\n down"]


@pytest.mark.parametrize(
    ("steps", "separator"),
    [
        (["1 + 2 = 3", " so 3"], "\n"),
        (["1 + 2 = 3\n", "\n so 3\n\n"], "\n"),
        (["1 + 2\n= 3\n", "\nso 3", "3"], "\n\n"),
        (["1 + 2 = 3 ки", " so 3 ", "3"], " ки"),
    ],
)
def test_steps_are_learnt_where_a_whole_answer_of_them_is_judged(steps: list[str], separator: str) -> None:
    judge = Judge(HandScorer(TOKENIZER, len, "process", separator))
    for prompt in ("1 + 2 =", ASKED):
        (tokens,) = judged("steps", separator).encode([Stepwise(prompt, steps, [True] * len(steps), W)])
        learnt = [index for index, mark in enumerate(tokens.trained) if mark == 3]
        assert len(learnt) == len(steps)
        assert judge.encode(Answer(prompt, separator.join(steps), W)) == (tokens.ids, learnt)
        assert judge.encode_steps(prompt, steps, W) == (tokens.ids, learnt)


@pytest.mark.parametrize(("step", "separator"), [("1 + 2\n= 3", "\n"), (" ки", " ки"), ("a ки b", " ки")])
def test_a_step_that_would_be_cut_is_neither_learnt_nor_judged(step: str, separator: str) -> None:
    example = Stepwise("1 + 2 =", ["first", step], [True, True], W)
    (tokens,) = judged("steps", separator).encode([example])
    assert tokens.ids == []
    assert tokens.why == f"a step of theirs would be cut by algorithm.separator {separator!r}"
    with pytest.raises(InputError, match="step 2 would be cut by the separator") as told:
        AnswerEncoder(TOKENIZER, separator).steps("1 + 2 =", example.completions, W)
    assert told.value.where == W and "another separator" in str(told.value.remedy)


def test_an_answer_that_was_cut_off_within_a_separator_is_judged() -> None:
    """No example is learnt whose step ends so."""
    judge = Judge(HandScorer(TOKENIZER, len, "process", "---"))
    ids, ends = judge.encode(Answer("1 + 2 =", "3---so-", W))
    assert [TOKENIZER.decode(ids[: end + 1]).removeprefix("<bos>1 + 2 =") for end in ends] == ["3---", "3---so----"]
    (tokens,) = judged("steps", "---").encode([Stepwise("1 + 2 =", ["3", "so-"], [True, True], W)])
    assert tokens.ids == []


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


def test_halves_of_pairs_without_a_prompt() -> None:
    """By the messages that they begin with; texts by themselves."""
    made = judged()
    one, other = ([*ASKED, assistant(text)] for text in ("Four.", "4"))
    halves = [made.halved_by(Preference(None, one, [*ASKED, assistant(text)], W)) for text in ("Five.", "Six.")]
    assert halves[0] == halves[1] == made.halved_by(Preference(ASKED, one[-1:], other[-1:], W))
    assert halves[0] == made.halved_by(Ranking(None, [one, other], [1, 2], W))
    for prompt in (None, ""):
        texts = [made.halved_by(Preference(prompt, f"It is {n}", "It is not", W)) for n in range(3)]
        assert len(set(texts)) == 3


def test_an_answer_is_asked_about_as_it_was_learnt() -> None:
    for prompt, answer in ((ASKED, [assistant("Four.")]), ("2 + 2 =", " 4")):
        other: Any = [assistant("Five.")] if isinstance(answer, list) else " 5"
        (tokens,) = judged().encode([Preference(prompt, answer, other, W)])
        mine = [token for token, mark in zip(tokens.ids, tokens.trained, strict=True) if mark >> 1 in (0, 1)]
        text = answer if isinstance(answer, str) else answer[0]["content"]
        assert AnswerEncoder(TOKENIZER).answer(prompt, text, W) == mine
