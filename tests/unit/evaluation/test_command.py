"""`llmtrain eval`, as a user runs it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmtrain.evaluation.tasks import load_task
from llmtrain.models.saved import load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator
from tests import tiny
from tests.saved import CommandLine, Done, assert_refused, write_adapter, write_model

TEXTS = ["w3 w4 w5 w6", "w7", "w8 w9 " * 50, "w10 w11 w12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "model")


def write_jsonl(file: str, *rows: Any) -> None:
    Path(file).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def figures(done: Done) -> dict[tuple[str, str], float]:
    assert done.code == 0, done.err
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert lines[0] == ["task", "figure", "value", "stderr", "rows"]
    return {(task, figure): float(value) for task, figure, value, _, _ in lines[1:]}


def greedy(model: Path, text: str, num: int) -> str:
    saved = load_saved(str(model))
    found: list[Completion] = []
    ids = saved.tokenizer.encode(text, add_special_tokens=False)
    generator = TextGenerator(saved, (1,), Sampling(max_new_tokens=num))
    generator.generate([Request(ids)], lambda _, completion: found.append(completion))
    return found[0].text


# ------------------------------------------------------------------------------------ perplexity


def write_perplexity(**settings: Any) -> None:
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    task = {"kind": "perplexity", "data": [{"kind": "text", "paths": ["texts.txt"], "document": "line"}]} | settings
    Path("ppl.yaml").write_text(json.dumps(task))


@torch.no_grad()
def slow_loss(model: Path, length: int, overlap: int, end: bool) -> float:
    """Every counted token by a forward of its own on what it may see."""
    weights, nats = AutoModelForCausalLM.from_pretrained(model), []
    for text in TEXTS:
        ids = [0, *(int(word[1:]) for word in text.split()), *([1] if end else [])]
        start = 0
        for place in range(1, len(ids)):
            if place >= start + length:
                start = place - 1 - overlap
            logits = weights(torch.tensor([ids[start:place]])).logits[0, -1]
            nats.append(float(F.cross_entropy(logits[None], torch.tensor([ids[place]]))))
    return sum(nats) / len(nats)


@pytest.mark.parametrize(("length", "overlap", "end"), [(64, 0, False), (16, 0, True), (16, 6, False)])
def test_perplexity(llmtrain: CommandLine, model: Path, length: int, overlap: int, end: bool) -> None:
    write_perplexity(sequence_length=length, overlap=overlap, end_of_text=end)
    found = figures(llmtrain("eval", model, "ppl.yaml", "--output", "out.json", "--samples", "rows.jsonl"))
    loss = slow_loss(model, length, overlap, end)
    assert found["ppl", "loss"] == pytest.approx(loss, rel=1e-3)
    assert found["ppl", "perplexity"] == pytest.approx(math.exp(loss), rel=5e-3)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [4 + end, 1 + end, 100 + end, 3 + end]
    assert rows[0]["bytes"] == len("w3w4w5w6")  # this tokenizer's words have no spaces
    nats, num_bytes = sum(row["nats"] for row in rows), sum(row["bytes"] for row in rows)
    exact = json.loads(Path("out.json").read_text())["tasks"]["ppl"]["figures"]
    assert exact["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert exact["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert exact["loss"]["rows"] == 4 and exact["loss"]["stderr"] > 0


def test_perplexity_of_an_adapter_and_of_few_documents(llmtrain: CommandLine, model: Path) -> None:
    write_perplexity()
    of_base = figures(llmtrain("eval", model, "ppl.yaml"))
    write_adapter(Path("adapter"), model, "prompt_tuning")
    assert figures(llmtrain("eval", "adapter", "ppl.yaml")) != of_base
    done = llmtrain("eval", model, "ppl.yaml", "--limit", 2)
    assert done.out.splitlines()[1].split("\t")[-1] == "2"


def test_texts_that_are_not_there(llmtrain: CommandLine, model: Path) -> None:
    write_perplexity(sequence_length=100)
    assert_refused(llmtrain("eval", model, "ppl.yaml"), "ppl.yaml:1: sequence_length: 100 tokens", "window is 64")
    write_perplexity()
    Path("texts.txt").write_text("\n")
    assert_refused(llmtrain("eval", model, "ppl.yaml"), "ppl.yaml:1: data: the sources hold no document")
    Path("texts.txt").unlink()
    assert_refused(llmtrain("eval", model, "ppl.yaml"), "texts.txt: no such file")


# ------------------------------------------------------------------------------------- questions


def write_questions(model: Path, **settings: Any) -> None:
    """Three questions, of which the model has one right."""
    said = greedy(model, "<s> w7 w8", 4).split()
    rows = [
        {"question": "w7 w8", "answer": said[0]},
        {"question": "w9 w10", "answer": "nothing"},
        {"question": "w11", "answer": ["no", "none"]},
    ]
    write_jsonl("rows.jsonl", *rows)
    task = {
        "kind": "exact_match",
        "data": "rows.jsonl",
        "prompt": "{question}",
        "max_new_tokens": 4,
        "extract": r"^\s*(\S+)",
        "format": r"\s*(\S+\s*){1,4}",
    }
    Path("qa.yaml").write_text(json.dumps(task | settings))


def test_exact_match(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model)
    done = llmtrain("eval", model, "qa.yaml", "--output", "out.json", "--samples", "said.jsonl")
    found = figures(done)
    assert found["qa", "accuracy"] == pytest.approx(1 / 3, rel=1e-3)
    assert 0 <= found["qa", "format_rate"] <= 1
    result = json.loads(Path("out.json").read_text())
    accuracy = result["tasks"]["qa"]["figures"]["accuracy"]
    assert accuracy["stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert result["model"] == str(model) and result["dtype"] == "float32"
    assert result["tasks"]["qa"]["settings"]["prompt"] == "{question}"
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [row["completions"][0]["correct"] for row in said] == [True, False, False]
    assert said[0]["prompt"] == "w7 w8" and said[2]["right"] == ["no", "none"]
    again = llmtrain("eval", model, "qa.yaml", "--samples", "again.jsonl")
    assert again.out == done.out
    assert Path("again.jsonl").read_text() == Path("said.jsonl").read_text()


def test_several_samples_a_row(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model, samples=8, temperature=3.0)
    done = llmtrain("eval", model, "qa.yaml", "--samples", "said.jsonl", "--limit", 1)
    found = figures(done)
    said = json.loads(Path("said.jsonl").read_text())["completions"]
    assert len({entry["text"] for entry in said}) > 4
    right = [entry["correct"] for entry in said]
    assert found["qa", "accuracy"] == pytest.approx(sum(right) / 8)
    assert found["qa", "pass@8"] == float(any(right))
    assert figures(llmtrain("eval", model, "qa.yaml", "--limit", 1)) == found


def asked(llmtrain: CommandLine, model: Path) -> list[Any]:
    done = llmtrain("eval", model, "qa.yaml", "--samples", "said.jsonl")
    assert done.code == 0, done.err
    return [json.loads(line)["prompt"] for line in Path("said.jsonl").read_text().splitlines()]


def test_few_shot_examples(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model, fewshot={"data": "shots.jsonl", "num": 2}, separator=" w50 ", prompt="w3 {question}")
    write_jsonl("shots.jsonl", *({"question": f"w{n}", "answer": f"w{n + 1}"} for n in (20, 30, 40)))
    assert asked(llmtrain, model)[2] == "w3 w20 w21 w50 w3 w30 w31 w50 w3 w11"
    write_questions(model, fewshot={"data": "shots.jsonl", "num": 1}, chat=True, system="w60", target="it is {answer}")
    assert asked(llmtrain, model)[2] == [
        {"role": "system", "content": "w60"},
        {"role": "user", "content": "w20"},
        {"role": "assistant", "content": "it is w21"},
        {"role": "user", "content": "w11"},
    ]
    write_questions(model, fewshot={"data": "rows.jsonl", "num": 2}, separator=" w50 ")
    first, _, third = asked(llmtrain, model)
    assert first == "w9 w10 nothing w50 w7 w8", "a question was told its own answer"
    assert "w7 w8" in third and "w9 w10" in third
    write_questions(model, fewshot={"data": "shots.jsonl", "num": 4})
    assert_refused(llmtrain("eval", model, "qa.yaml"), "qa.yaml:1: fewshot.num: 4 examples, and shots.jsonl has 3")


def test_rows_of_messages(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model, prompt=None, messages="talk")
    turns = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    write_jsonl("rows.jsonl", {"talk": turns, "answer": 8}, {"talk": turns[:1], "answer": 8.5})
    assert asked(llmtrain, model) == [turns[:1], turns[:1]]
    write_jsonl("rows.jsonl", {"talk": "w7", "answer": 8})
    assert_refused(llmtrain("eval", model, "qa.yaml"), "rows.jsonl:1: field 'talk' is no list of messages")


def test_mathematics(llmtrain: CommandLine, model: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: python -m pip install 'llmtrain[eval]'")
    write_questions(model, kind="math", extract=r"w(\d+)")
    said = greedy(model, "<s> w7 w8", 4).split()[-1].removeprefix("w")
    write_jsonl("rows.jsonl", {"question": "w7 w8", "answer": f"\\frac{{{2 * int(said)}}}{{2}}"})
    assert figures(llmtrain("eval", model, "qa.yaml"))["qa", "accuracy"] == 1


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ("{", ["rows.jsonl:1: not JSON"]),
        ({"answer": "x"}, ["rows.jsonl:1: no field 'question'; fields there: answer", "qa.yaml:1: prompt"]),
        ({"question": "w3", "anwser": 1}, ["no field 'answer'", "did you mean 'anwser'?"]),
        ({"question": "w3", "answer": None}, ["field 'answer' is None: neither a text or a number nor a list"]),
        ({"question": "w3", "answer": True}, ["field 'answer' is True"]),
        ({"question": "w3 " * 80, "answer": 1}, ["rows.jsonl:1: 1 of 1 prompts do not fit the model's window of 64"]),
    ],
)
def test_bad_rows(llmtrain: CommandLine, model: Path, row: Any, texts: list[str]) -> None:
    write_questions(model)
    write_jsonl("rows.jsonl", row)
    assert_refused(llmtrain("eval", model, "qa.yaml"), *texts, "remedy")


def test_a_chat_task_for_a_model_without_a_template(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model, chat=True)
    bare = write_model(Path("bare"), chat=False)
    assert_refused(llmtrain("eval", bare, "qa.yaml"), "qa.yaml:1: chat: the tokenizer of bare has no chat template")


# ------------------------------------------------------------------------------------- task files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: exact_match\ndata: a\nprompt: b\nextrct: c\n", "t.yaml:4: extrct: unknown key 'extrct' for kind"),
        ("kind: exact_mach\ndata: a\n", "t.yaml:1: kind: the text 'exact_mach' is not allowed; did you mean"),
        ("data: a\n", "t.yaml:1: missing key 'kind'; allowed: perplexity, exact_match, math, multiple_choice, lm_eval"),
        ("kind: math\nprompt: b\n", "t.yaml:1: missing key 'data' (A JSONL file, relative to this file)"),
        ("kind: math\ndata: a\n", "t.yaml:1: give exactly one of prompt and messages"),
        ("kind: math\ndata: a\nprompt: b\nextract: '('\n", "t.yaml:4: extract is no regular expression: missing )"),
        ("kind: math\ndata: a\nprompt: 'a {'\n", "t.yaml:3: prompt is no template: '{' at character 2"),
        ("kind: math\ndata: a\nprompt: b\nsamples: 4\n", "t.yaml:4: samples of a greedy model are all the same"),
        ("kind: math\ndata: a\nprompt: b\nsamples: many\n", "t.yaml:4: samples: expected an integer, given the text"),
        ("kind: math\ndata: a\nprompt: b\nsystem: c\n", "t.yaml:4: system is for conversations"),
        (
            "kind: exact_match\ndata: a\nprompt: b\nnormalize: [upper]\n",
            "t.yaml:4: normalize.0: the text 'upper' is not allowed; allowed: strip, lower, numeric",
        ),
        ("kind: perplexity\ndata: []\n", "t.yaml:2: data: must have at least 1 item"),
        ("kind: perplexity\ndata:\n- kind: text\n  path: a\n", "t.yaml:4: data.0.path: unknown key 'path'"),
        ("", "t.yaml:1: the task is empty"),
        ("a: [", "t.yaml:1: not valid YAML"),
    ],
)
def test_mistakes_in_a_task(llmtrain: CommandLine, model: Path, text: str, message: str) -> None:
    Path("t.yaml").write_text(text)
    assert_refused(llmtrain("eval", model, "t.yaml"), message)


def test_the_mistakes_of_all_tasks_are_told(llmtrain: CommandLine, model: Path) -> None:
    Path("a.yaml").write_text("kind: math\n")
    assert_refused(llmtrain("eval", model, "a.yaml", "b.yaml"), "a.yaml:1: ", "b.yaml: cannot be read: No such file")


def test_names_of_tasks(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model)
    Path("sums").mkdir()
    Path("qa.yaml").rename("sums/task.yaml")
    Path("rows.jsonl").rename("sums/rows.jsonl")
    assert load_task(Path("sums/task.yaml")).name == "sums"
    assert ("sums", "accuracy") in figures(llmtrain("eval", model, "sums/task.yaml"))
    assert_refused(llmtrain("eval", model, "sums/task.yaml", "sums/task.yaml"), "two tasks are called sums")


def test_results_that_cannot_be_written(llmtrain: CommandLine, model: Path) -> None:
    write_questions(model)
    assert_refused(llmtrain("eval", model, "qa.yaml", "--output", "no/out.json"), "--output: no such directory: no")
    Path("out.json").mkdir()
    assert_refused(llmtrain("eval", model, "qa.yaml", "--output", "out.json"), "--output: out.json is a directory")
    assert_refused(llmtrain("eval", "nothing/at/all", "qa.yaml"), "no such directory: nothing/at/all")


# ---------------------------------------------------------------------------------------- lm-eval

LM_EVAL_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" w20", " w30"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def test_tasks_of_lm_eval(llmtrain: CommandLine, model: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: python -m pip install 'llmtrain[eval]'")
    questions = [f"w{n} w{n + 1}" for n in range(3, 23)]
    write_jsonl("choice.jsonl", *({"question": text} for text in questions))
    Path("tasks").mkdir()
    Path("tasks/choice.yaml").write_text(LM_EVAL_TASK.replace("FILE", str(Path("choice.jsonl").absolute())))
    Path("lm.yaml").write_text("kind: lm_eval\ntasks: [tiny_choice]\ninclude_path: tasks\n")
    found = figures(llmtrain("eval", model, "lm.yaml", "--output", "out.json"))
    saved = load_saved(str(model))
    logits = [saved.logits(torch.tensor([saved.tokenizer.encode(text)]))[0, -1] for text in questions]
    expected = sum(float(row[20] > row[30]) for row in logits) / len(questions)
    assert found["lm", "tiny_choice/acc"] == pytest.approx(expected)
    entry = json.loads(Path("out.json").read_text())["tasks"]["lm"]["figures"]["tiny_choice/acc"]
    assert entry["rows"] == 20 and entry["stderr"] is not None
    Path("lm.yaml").write_text("kind: lm_eval\ntasks: [tiny_chioce]\ninclude_path: tasks\n")
    assert_refused(llmtrain("eval", model, "lm.yaml"), "lm.yaml:2: tasks: lm-eval has no task 'tiny_chioce'")


def test_the_tiny_tokenizer_begins_documents() -> None:
    """What the slow loss above takes for granted."""
    assert tiny.tokenizer().bos_token_id == 0
