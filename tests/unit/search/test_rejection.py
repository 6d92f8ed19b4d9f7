"""`llmtrain rejection-sample` against the answers that `llmtrain eval` draws and judges."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.formats import Conversation, Example, Preference, PromptCompletion, read_examples
from llmtrain.models.reward import Reward
from llmtrain.models.scorer import load_scorer
from llmtrain.recipe.schema import JSONLSource
from llmtrain.sampling import partial
from llmtrain.search.rejection import Sample, select
from llmtrain.search.scoring import score_answers
from tests import scorers, tiny
from tests.chats import sft_recipe, write_chat_model
from tests.saved import (
    CHAT_TEMPLATE,
    INTERRUPTIONS,
    CommandLine,
    Done,
    assert_refused,
    interrupt,
    kept_in,
    write_model,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rejection")
    write_model(directory / "policy", max_position_embeddings=128)
    scorers.write(directory / "scorer", "outcome", Reward("outcome", 0.5))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory / "scorer")
    return directory


@pytest.fixture
def llmtrain(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path
) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "scorer"):
        Path(name).symlink_to(models / name)
    return CommandLine(capfd)


SOME_WORDS = [f"w{number}" for number in range(3, 50)]


def write_task(rows: Sequence[dict[str, Any]] | None = None, **settings: Any) -> None:
    """Questions whose answer is the last word that is said; half of the words are right."""
    rows = rows or [{"q": f"w{20 + number} w{30 + number}", "answer": SOME_WORDS} for number in range(6)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "exact_match", "data": "rows.jsonl", "extract": r"w\d+", "max_new_tokens": 40}
    asked = {} if "messages" in settings else {"prompt": "{q}"}
    Path("task.yaml").write_text(json.dumps(task | asked | settings))


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def examples(file: str) -> list[Example]:
    return list(read_examples(JSONLSource(kind="jsonl", paths=[file])))


def counts(done: Done) -> dict[str, int]:
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines() if "\t" in line]
    return {name: int(number) for name, number in rows[1:]}


def drawn_by_eval(llmtrain: CommandLine, num: int) -> list[dict[str, Any]]:
    """The same answers, judged by `llmtrain eval`: a row a question."""
    task = json.loads(Path("task.yaml").read_text()) | {"samples": num, "temperature": 1.0}
    Path("measured.yaml").write_text(json.dumps(task))
    done = llmtrain("eval", "policy", "measured.yaml", "--samples", "said.jsonl")
    assert done.code == 0, done.err
    return read("said.jsonl")


COMMAND = ("rejection-sample", "policy", "task.yaml", "--output", "kept.jsonl")


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_right_is_kept(llmtrain: CommandLine, chat: bool) -> None:
    write_task(chat=chat, format=r".*(w\d[02468]|w[3-9]).*")
    done = llmtrain(*COMMAND, "--num", 12, "--keep", 3, "--pairs", "pairs.jsonl")
    said, kept, pairs = drawn_by_eval(llmtrain, 12), read("kept.jsonl"), read("pairs.jsonl")
    right = [[one["correct"] and one["format"] for one in row["completions"]] for row in said]
    ended = [[one["finish_reason"] == "stop" for one in row["completions"]] for row in said]
    for question, row in enumerate(said):
        texts = [one["text"] for one in row["completions"]]
        good = [n for n in range(12) if right[question][n] and ended[question][n] and texts[n].strip()]
        bad = [n for n in range(12) if not right[question][n] and ended[question][n] and texts[n].strip()]
        own = [one for one in kept if one["question"] == question]
        assert [one["sample"] for one in own] == good[:3]
        for one in own:
            asked = {"messages": one["messages"][:-1]} if chat else {"prompt": one["prompt"]}
            assert list(asked.values()) == [row["prompt"]]
            assert texts[one["sample"]] == (one["messages"][-1]["content"] if chat else one["completion"])
            assert one["correct"] and one["formatted"]
        compared = [one["samples"] for one in pairs if one["question"] == question]
        assert compared == [list(pair) for pair in zip(good[:3], bad, strict=False)]
    assert {type(one) for one in examples("kept.jsonl")} == {Conversation if chat else PromptCompletion}
    assert {type(one) for one in examples("pairs.jsonl")} == {Preference}
    told = counts(done)
    assert (told["questions"], told["answers"], told["kept"], told["pairs"]) == (6, 72, len(kept), len(pairs))
    assert told["right"] == sum(map(sum, right)) and told["cut off"] == sum(row.count(False) for row in ended)
    assert told["questions without a right answer"] == sum(not any(row) for row in right)
    assert told["questions without a kept answer"] == 6 - len({one["question"] for one in kept})
    source = kept[0]["provenance"]
    assert (source["model"], source["temperature"], source["seed"], source["max_new_tokens"]) == ("policy", 1.0, 0, 40)


def test_a_reward_model_chooses(llmtrain: CommandLine) -> None:
    write_task()
    settings = ("--scorer", "scorer", "--pairs", "pairs.jsonl", "--num", 12)
    assert llmtrain(*COMMAND, *settings, "--keep", 2).code == 0
    said = drawn_by_eval(llmtrain, 12)
    scorer = load_scorer("scorer")
    for question, row in enumerate(said):
        scores = score_answers(scorer, [(row["prompt"], one["text"]) for one in row["completions"]])
        usable = [n for n, one in enumerate(row["completions"]) if one["finish_reason"] == "stop" and one["text"]]
        usable.sort(key=lambda n: -scores[n])
        right = [n for n in usable if row["completions"][n]["correct"]]
        wrong = [n for n in usable if n not in right]
        own = [one for one in read("kept.jsonl") if one["question"] == question]
        assert [one["sample"] for one in own] == right[:2]
        assert [one["score"] for one in own] == pytest.approx([scores[n] for n in right[:2]], abs=1e-5)
        pairs = [one for one in read("pairs.jsonl") if one["question"] == question]
        assert [one["samples"] for one in pairs] == [list(pair) for pair in zip(right[:2], wrong, strict=False)]
    everything = read("kept.jsonl")
    assert everything[0]["provenance"]["scorer"] == "scorer"
    limit = sorted(one["score"] for one in everything)[len(everything) // 2]
    again = ("rejection-sample", "policy", "task.yaml", "--output", "high.jsonl", "--min-score", limit)
    assert llmtrain(*again, "--scorer", "scorer", "--num", 12, "--keep", 2).code == 0
    high = [(one["question"], one["sample"]) for one in read("high.jsonl")]
    assert high == [(one["question"], one["sample"]) for one in everything if one["score"] >= limit]


def test_distillation_needs_no_answers(llmtrain: CommandLine) -> None:
    write_task([{"q": "w20 w30"}, {"q": "w21"}], kind="math")
    assert_refused(llmtrain(*COMMAND), "rows.jsonl:1", "no field 'answer'")
    told = counts(llmtrain(*COMMAND, "--no-rule", "--num", 8, "--keep", 8))
    assert told["kept"] == 16 - told["duplicates"] - told["empty"] and "right" not in told
    said = read("kept.jsonl")
    cut_off = [len(one["completion"].split()) > 35 for one in said if one["question"] == 0]  # of 40 tokens
    assert cut_off == sorted(cut_off) and len(set(cut_off)) == 2, "those that were cut off come last"


def test_conversations_with_other_answers_keep_these_unlearnt(llmtrain: CommandLine) -> None:
    said = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21"}]
    rows = [{"messages": [*said, {"role": "user", "content": "w22"}], "answer": SOME_WORDS}]
    write_task(rows, messages="messages")
    assert llmtrain(*COMMAND, "--num", 16).code == 0
    [example] = examples("kept.jsonl")
    assert isinstance(example, Conversation)
    assert (example.messages[:-1], example.num_prompt) == (rows[0]["messages"], 3)


def sample(number: int, text: str, **fields: Any) -> Sample:
    return Sample(number, text, **({"cut_off": False, "correct": True} | fields))


def test_selection() -> None:
    samples = [
        sample(0, "a", cut_off=True),
        sample(1, "b ", correct=False),
        sample(2, " c"),
        sample(3, "c"),
        sample(4, "\n"),
        sample(5, "d", formatted=False),
        sample(6, "e", formatted=True),
        sample(7, "b", correct=False),
    ]

    def numbers(keep: int, rule: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        kept, pairs = select(samples, keep, rule)
        return [one.number for one in kept], [(right.number, wrong.number) for right, wrong in pairs]

    assert numbers(1) == ([2], [(2, 1)])
    assert numbers(8) == ([2, 6], [(2, 1), (6, 5)])
    assert numbers(8, rule=False) == ([1, 2, 5, 6, 0], [])


def test_selection_by_score() -> None:
    samples = [
        sample(0, "a", score=0.1),
        sample(1, "b", score=0.9, correct=False),
        sample(2, "c", score=0.7),
        sample(3, "d", score=-2.0, correct=False),
        sample(4, "e", score=float("-inf"), unread=True),
        sample(5, "c", score=0.8),
    ]
    kept, pairs = select(samples, 3, True)
    assert [one.number for one in kept] == [5, 0]
    assert [(right.number, wrong.number) for right, wrong in pairs] == [(5, 1), (0, 3)]
    assert [one.number for one in select(samples, 3, True, 0.5)[0]] == [5]
    assert [one.number for one in select(samples, 9, False)[0]] == [1, 5, 0, 3]


@pytest.mark.parametrize(("number", "code"), INTERRUPTIONS)
def test_an_interrupted_command_goes_on(
    llmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    write_task()
    assert llmtrain(*COMMAND).code == 0
    whole = Path("kept.jsonl").read_text()
    Path("kept.jsonl").unlink()
    append, entries = partial._append, list[Any]()

    def killed(file: Any, entry: Any) -> None:
        if len(entries) == 3:
            file.write('{"unit": [5], "comp')
            file.flush()
            interrupt(number)
        entries.append(entry)
        append(file, entry)

    monkeypatch.setattr(partial, "_append", killed)
    done = llmtrain(*COMMAND)
    assert (done.code, done.err.splitlines()[-1]) == (code, kept_in("kept.jsonl"))
    assert not Path("kept.jsonl").exists()
    monkeypatch.setattr(partial, "_append", append)
    for other in (("--seed", 1), ("--num", 9), ("--limit", 5), ("--max-new-tokens", 20)):
        assert_refused(llmtrain(*COMMAND, *other), "kept.jsonl.partial is what another command")
    done = llmtrain(*COMMAND)
    assert "4 questions answered" in done.out and "2 questions were answered before" in done.out
    assert Path("kept.jsonl").read_text() == whole
    assert not Path("kept.jsonl.partial").exists()


def test_when_nothing_is_right_the_answers_are_not_lost(llmtrain: CommandLine) -> None:
    write_task([{"q": "w20 w30", "answer": "none"}])
    done = llmtrain(*COMMAND)
    assert_refused(done, "none of 8 answers is kept", "--no-rule", "--num")
    assert "questions without a right answer\t1" in done.out
    assert not Path("kept.jsonl").exists()
    done = llmtrain(*COMMAND, "--no-rule")
    assert "0 questions answered, 0 tokens" in done.out and len(read("kept.jsonl")) == 1


def test_when_all_are_cut_off_longer_answers_are_the_way(llmtrain: CommandLine) -> None:
    write_task(max_new_tokens=1)
    done = llmtrain(*COMMAND)
    assert_refused(
        done, "none of 48 answers is kept", "remove kept.jsonl.partial, and let answers be longer by --max-new"
    )
    assert "48 were cut off" in done.err and "--num" not in done.err
    Path("kept.jsonl.partial").unlink()
    assert llmtrain(*COMMAND, "--max-new-tokens", 40).code == 0


def test_data_that_would_be_written_over_are_refused(llmtrain: CommandLine) -> None:
    write_task(data="kept.jsonl.partial")
    rows = Path("kept.jsonl.partial")
    Path("rows.jsonl").rename(rows)
    before = rows.read_bytes()
    for command in ("rejection-sample", "label-steps", "search"):
        done = llmtrain(command, "policy", "task.yaml", "--output", "kept.jsonl")
        assert_refused(done, "--output: kept.jsonl.partial is read", "name another output")
    assert rows.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has it")
def test_pairs_that_cannot_be_written_cost_nothing(llmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither appears before both are whole, so that the same command can be given again."""
    write_task()
    append, aside = partial._append, Path(f".writing-{os.getpid()}-pairs.jsonl")

    def meanwhile(file: Any, entry: Any) -> None:
        append(file, entry)
        if not aside.is_symlink():
            aside.symlink_to("/dev/full")

    with_pairs = (*COMMAND, "--pairs", "pairs.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(partial, "_append", meanwhile)
        assert_refused(llmtrain(*with_pairs), "cannot be written: No space left", "the same command goes on", code=1)
    assert [path.name for path in Path().glob("*pairs*")] == [] and not Path("kept.jsonl").exists()
    done = llmtrain(*with_pairs)
    assert done.code == 0 and "0 questions answered, 0 tokens" in done.out
    assert Path("kept.jsonl").exists() and Path("pairs.jsonl").exists()


def test_what_came_to_an_outputs_name_meanwhile_is_not_overwritten(
    llmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task()
    append = partial._append

    def meanwhile(file: Any, entry: Any) -> None:
        append(file, entry)
        Path("kept.jsonl").write_text("another's")

    monkeypatch.setattr(partial, "_append", meanwhile)
    done = llmtrain(*COMMAND)
    assert_refused(done, "kept.jsonl was made by another", "what was written is in kept-1.jsonl", code=1)
    assert Path("kept.jsonl").read_text() == "another's" and read("kept-1.jsonl")


def test_answers_of_a_model_that_was_trained_again_are_not_taken_for_its_own(
    llmtrain: CommandLine, models: Path, tmp_path: Path
) -> None:
    write_task([{"q": "w20 w30", "answer": "none"}])
    Path("policy").unlink()
    shutil.copytree(models / "policy", "policy")
    assert_refused(llmtrain(*COMMAND), "none of 8 answers is kept")
    weights = Path("policy/model.safetensors")
    shutil.copy2(weights, "same")
    os.replace("same", weights)  # of the same size and time
    assert_refused(llmtrain(*COMMAND, "--no-rule"), "kept.jsonl.partial is what another command", "model")
    shutil.copytree(models / "policy", "policy", dirs_exist_ok=True)
    weights.write_bytes((models / "policy/model.safetensors").read_bytes())
    assert_refused(llmtrain(*COMMAND, "--no-rule"), "kept.jsonl.partial is what another command", "model")


def test_pairs_that_there_are_not(llmtrain: CommandLine) -> None:
    write_task([{"q": "w20 w30", "answer": "yes"}], extract=r"(?P<answer>)", answer_extract="(?P<answer>)")
    done = llmtrain(*COMMAND, "--pairs", "pairs.jsonl", "--num", 16)
    assert done.code == 0
    assert "pairs.jsonl is not written: no question has a right and a wrong answer" in done.err
    assert not Path("pairs.jsonl").exists() and len(read("kept.jsonl")) == 1


def test_what_is_refused(llmtrain: CommandLine) -> None:
    write_task()
    assert_refused(llmtrain(*COMMAND, "--num", 2, "--keep", 3), "--keep: 3 of 2 answers")
    assert_refused(llmtrain(*COMMAND, "--temperature", 0), "--temperature: 0: the 8 samples of a greedy model")
    assert_refused(llmtrain(*COMMAND, "--min-score", 1), "--min-score: needs a reward model", "--scorer")
    assert_refused(llmtrain(*COMMAND, "--no-rule", "--pairs", "p.jsonl"), "--pairs: only the rule says")
    for name in ("kept.jsonl", "./kept.jsonl", Path("kept.jsonl").absolute()):
        assert_refused(llmtrain(*COMMAND, "--pairs", name), "is that of --pairs, too")
    assert_refused(llmtrain(*COMMAND, "--scorer", "nowhere"), "--scorer: no such directory: nowhere")
    assert_refused(llmtrain(*COMMAND, "--scorer", "policy"), "--scorer: policy is", "which gives no score")
    assert_refused(llmtrain(*COMMAND, "--scorer", "scorer", "--aggregate", "min"), "--aggregate: min of the steps")
    for score in ("nan", "inf"):
        refused = llmtrain(*COMMAND, "--scorer", "scorer", "--min-score", score)
        assert_refused(refused, f"--min-score: {score} is no score to reach")
    for name in ("kept.jsonl.partial", "../" + Path.cwd().name + "/kept.jsonl.partial"):
        assert_refused(llmtrain(*COMMAND, "--pairs", name), "--pairs: ", "is where --output is begun")
    Path("lm.yaml").write_text("kind: perplexity\ndata: [{kind: text, paths: [x.txt]}]\n")
    refused = llmtrain("rejection-sample", "policy", "lm.yaml", "--output", "kept.jsonl")
    assert_refused(refused, "kind perplexity has no questions", "exact_match or math")
    write_task([{"q": "w20 " * 200, "answer": "w3"}])
    assert_refused(llmtrain(*COMMAND), "rows.jsonl:1: 1 of 1 prompts do not fit")
    Path("kept.jsonl").touch()
    assert_refused(
        llmtrain("rejection-sample", "no", "no.yaml", "--output", "kept.jsonl"), "--output: kept.jsonl exists"
    )
    assert not os.path.exists("kept.jsonl.partial")


def test_sft_learns_from_it_as_it_is(llmtrain: CommandLine, tmp_path: Path) -> None:
    recipe = sft_recipe(tmp_path, steps=2)
    write_chat_model(tmp_path / "model")
    write_task([{"q": f"What is {number} + 1?"} for number in range(8)], chat=True, max_new_tokens=24)
    done = llmtrain("rejection-sample", "model", "task.yaml", "--output", "kept.jsonl", "--no-rule", "--keep", 4)
    assert done.code == 0, done.err
    recipe["data"] |= {"train": [{"kind": "jsonl", "paths": ["kept.jsonl"]}]}
    Path("sft.yaml").write_text(json.dumps(recipe))
    done = llmtrain("train", "sft.yaml")
    assert done.code == 0, done.err
