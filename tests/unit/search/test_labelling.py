"""`llmtrain label-steps` against rollouts that are drawn one by one."""

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.formats import Stepwise, read_examples
from llmtrain.models.saved import load_saved
from llmtrain.models.steps import steps_of
from llmtrain.recipe.schema import JSONLSource
from llmtrain.sampling import partial
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator
from llmtrain.sampling.prompts import encode_begun, encode_messages, encode_text, end_ids
from tests.saved import INTERRUPTIONS, CommandLine, Done, assert_refused, interrupt, kept_in, write_model

SEPARATOR = " w9 "


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("labelling") / "policy", max_position_embeddings=128)


@pytest.fixture
def llmtrain(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Path
) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    Path("policy").symlink_to(policy)
    return CommandLine(capfd)


def write_task(words: Sequence[str] | None = None, **settings: Any) -> None:
    """Questions whose answer is the last word that is said; a quarter of the words are right."""
    right = words or [f"w{number}" for number in range(3, 25)]
    rows = [{"q": f"w{20 + number} w{30 + number}", "answer": right} for number in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "exact_match", "data": "rows.jsonl", "prompt": "{q}", "extract": r"w\d+", "max_new_tokens": 30}
    Path("task.yaml").write_text(json.dumps(task | settings))


def write_solutions(*rows: Any) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: str = "steps.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def counts(done: Done) -> dict[str, int]:
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines() if "\t" in line]
    return {name: int(number) for name, number in rows[1:]}


COMMAND = ("label-steps", "policy", "task.yaml", "--output", "steps.jsonl", "--separator", SEPARATOR)
SOLUTIONS = [
    "w40 w9 w41 w9 w60",  # wrong
    "w10 w9 w11 w9 w12 w9 w20",  # right
    "w77 w9 w78 w9 w79 w9 w80",
    "w50",
]


def given(chat: bool) -> list[dict[str, Any]]:
    rows = []
    for number, text in enumerate(SOLUTIONS):
        asked = f"w{20 + number} w{30 + number}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages} if chat else {"prompt": asked, "completion": f" {text}"})
    return rows


@pytest.mark.parametrize("chat", [False, True])
def test_values_are_shares_of_right_rollouts(llmtrain: CommandLine, policy: Path, chat: bool) -> None:
    write_task(chat=chat)
    write_solutions(*given(chat))
    done = llmtrain(*COMMAND, "--input", "in.jsonl", "--rollouts", 4, "--seed", 3, "--all-steps")
    told, rows = counts(done), read()
    assert (told["solutions"], told["steps"], told["steps rolled out from"]) == (4, 12, 8)
    assert told["steps labelled right"] == sum(sum(row["labels"]) for row in rows)
    saved = load_saved(str(policy))
    sampling = Sampling(30, 1.0, 1.0, 3)
    for question, row in enumerate(rows):
        text = ("" if chat else " ") + SOLUTIONS[question]
        assert row["completions"] == text.split(SEPARATOR)
        values = []
        for depth in range(len(row["completions"]) - 1):
            begun = SEPARATOR.join([*row["completions"][: depth + 1], ""])
            ids = encode_begun(saved.tokenizer, row["prompt"], begun, "here")
            right = 0
            for number in range(4):
                said: dict[int, Completion] = {}
                generator = TextGenerator(saved, end_ids(saved), sampling)
                generator.generate([Request(ids, question, number, part=depth + 1)], said.__setitem__)
                right += int(re.findall(r"w\d+", begun + said[0].text)[-1][1:]) < 25
            values.append(right / 4)
        assert row["values"] == [*values, float(question == 1)]
        assert row["labels"] == [value > 0 for value in row["values"]]
        assert row["correct"] == (question == 1)
    labelled = list(read_examples(JSONLSource(kind="jsonl", paths=["steps.jsonl"])))
    assert {type(one) for one in labelled} == {Stepwise}


def test_a_begun_answer_is_encoded_with_its_prompt(policy: Path) -> None:
    saved = load_saved(str(policy))
    messages = [{"role": "user", "content": "w20"}]
    for shown, asked in (
        ("w20 w30", encode_text(saved.tokenizer, "w20 w30", "here")),
        (messages, encode_messages(saved.tokenizer, messages, "here")),
    ):
        assert encode_begun(saved.tokenizer, shown, " w7 w9", "here") == [*asked, 7, 9]


def test_a_dead_end_is_not_gone_on_from(llmtrain: CommandLine) -> None:
    write_task(["w20"])
    write_solutions(*given(False))
    told = counts(llmtrain(*COMMAND, "--input", "in.jsonl", "--rollouts", 2))
    rows = read()
    assert rows[2]["values"] == [0.0, None, None, 0.0] and rows[2]["labels"] == [False] * 4
    assert rows[3]["values"] == [0.0], "a single step has the solution's own value"
    # What is right although no rollout was has a way on.
    assert None not in rows[1]["values"] and rows[1]["values"][-1] == 1.0
    skipped = sum(value is None for row in rows for value in row["values"])
    assert told["steps rolled out from"] == 8 - skipped
    assert told["questions without a right answer"] == sum(not any(row["labels"]) for row in rows)


def test_the_models_own_solutions(llmtrain: CommandLine) -> None:
    write_task()
    done = llmtrain(*COMMAND, "--num", 12, "--rollouts", 3)
    told, rows = counts(done), read()
    assert told["solutions"] + told["duplicates or empty"] + told["cut off"] == 48
    assert told["cut off"] > 0 and len(rows) == told["solutions"]
    for question in range(4):
        own = [row for row in rows if row["question"] == question]
        assert [row["solution"] for row in own] == list(range(len(own)))
    Path("measured.yaml").write_text(
        json.dumps(json.loads(Path("task.yaml").read_text()) | {"samples": 12, "temperature": 1.0})
    )
    assert llmtrain("eval", "policy", "measured.yaml", "--samples", "said.jsonl").code == 0
    said = {
        (row["row"], SEPARATOR.join(steps_of(one["text"], SEPARATOR))): one["correct"]
        for row in read("said.jsonl")
        for one in row["completions"]
        if one["finish_reason"] == "stop" and one["text"].strip()
    }
    assert {(row["question"], SEPARATOR.join(row["completions"])): row["correct"] for row in rows} == said


@pytest.mark.parametrize(
    ("source", "interruption"), [(("--num", 6), INTERRUPTIONS[0]), (("--input", "in.jsonl"), INTERRUPTIONS[1])]
)
def test_an_interrupted_command_goes_on(
    llmtrain: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    source: tuple[Any, ...],
    interruption: tuple[signal.Signals, int],
) -> None:
    number, code = interruption
    write_task()
    write_solutions(*given(False))
    command = (*COMMAND, *source, "--all-steps", "--rollouts", 3)
    assert llmtrain(*command).code == 0
    whole = Path("steps.jsonl").read_text()
    Path("steps.jsonl").unlink()
    append, entries = partial._append, list[Any]()

    def killed(file: Any, entry: Any) -> None:
        if len(entries) == 3:
            interrupt(number)
        entries.append(entry)
        append(file, entry)

    monkeypatch.setattr(partial, "_append", killed)
    done = llmtrain(*command)
    assert (done.code, done.err.splitlines()[-1]) == (code, kept_in("steps.jsonl"))
    assert not Path("steps.jsonl").exists()
    monkeypatch.setattr(partial, "_append", append)
    assert_refused(llmtrain(*command[:-1], 4), "steps.jsonl.partial is what another command")
    assert llmtrain(*command).code == 0
    assert Path("steps.jsonl").read_text() == whole
    assert not Path("steps.jsonl.partial").exists()


def test_given_solutions_that_were_cut_off_have_no_last_step(llmtrain: CommandLine) -> None:
    write_task(max_new_tokens=8)
    taking_all = ("--no-rule", "--keep", 8, "--output", "in.jsonl")
    assert llmtrain("rejection-sample", "policy", "task.yaml", *taking_all).code == 0
    cut_off = [row for row in read("in.jsonl") if row.get("cut_off")]
    whole = [row for row in read("in.jsonl") if "cut_off" not in row]
    assert cut_off and whole
    told = counts(llmtrain(*COMMAND, "--input", "in.jsonl", "--rollouts", 1))
    assert (told["cut off"], told["solutions"] + told["duplicates or empty"]) == (len(cut_off), len(whole))


def test_what_is_refused(llmtrain: CommandLine) -> None:
    write_task()
    with_input = (*COMMAND, "--input", "in.jsonl")
    assert_refused(llmtrain(*with_input), "--input: no such file: in.jsonl")
    write_solutions(*given(False), {"prompt": "w3", "completion": "w4"})
    assert_refused(llmtrain(*with_input), "in.jsonl:5: the prompt is none of the task's")
    assert llmtrain(*with_input, "--limit", 4, "--rollouts", 1).code == 0
    Path("steps.jsonl").unlink()
    write_solutions({"prompt": "w20 w30", "label": True})
    assert_refused(llmtrain(*with_input), "in.jsonl:1: no solution: it has prompt, label")
    write_solutions({"prompt": "w20 w30", "completion": " \n"})
    assert_refused(llmtrain(*with_input), "--input: no solution has a step")
    assert_refused(llmtrain(*COMMAND, "--max-new-tokens", 1, "--limit", 1), "no solution has a step; 1 were cut off")
    Path("steps.jsonl.partial").unlink()  # it has the answers
    write_solutions({"prompt": "w20 w30", "completion": f" {'w40 ' * 150} w9 w41"})
    assert_refused(llmtrain(*with_input), "in.jsonl:1: the question with all steps but the last has")
    assert_refused(llmtrain(*COMMAND, "--temperature", 0), "--temperature", "the 8 samples of a greedy model")
    assert_refused(llmtrain(*COMMAND[:-1], ""), "--separator: is empty")
    Path("steps.jsonl").touch()
    assert_refused(llmtrain(*COMMAND), "--output: steps.jsonl exists")
