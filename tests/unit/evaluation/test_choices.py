"""Multiple choice by likelihood, as a user runs it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as models_of_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmtrain.data.records import Record
from llmtrain.evaluation.asking import Asked
from llmtrain.evaluation.choices import _spans
from llmtrain.models.saved import load_saved
from tests.diffusion import BLOCK_SHIFTED, MASK, MASKED, UNIFORM, write_diffusion_model
from tests.likelihood import expected_bound
from tests.saved import CommandLine, Done, assert_refused, write_adapter, write_model

ROWS: list[dict[str, Any]] = [
    {"question": "w7 w8", "choices": ["w9", "w10 w11"], "answer": 0},
    {"question": "w9 w10", "choices": ["w20 w21 w22", "w5", "w6 w7"], "answer": "w5"},
    {"question": "w11", "choices": [12, "w30 w31 w32 w33 w34"], "answer": 1},
]
NAMES = ["accuracy", "accuracy_per_token", "accuracy_per_byte", "loss"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    kinds = {"masked": MASKED, "block": BLOCK_SHIFTED, "uniform": UNIFORM}
    written = {name: write_diffusion_model(base / name, kind) for name, kind in kinds.items()}
    return written | {"autoregressive": write_model(base / "autoregressive")}


def write_task(*rows: Any, **settings: Any) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    task = {"kind": "multiple_choice", "data": "rows.jsonl", "prompt": "{question}"}
    Path("mc.yaml").write_text(json.dumps(task | settings))


def records(done: Done, file: str = "rows.out") -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def figures(done: Done) -> dict[str, list[str]]:
    rows = [line.split("\t") for line in done.out.splitlines()[1:]]
    return {row[1]: row[2:] for row in rows}


def ids_of(text: str) -> list[int]:
    return [0, *(int(word[1:]) if word.startswith("w") else 2 for word in text.split())]


@torch.no_grad()
def slow_nats(model: Path, prompt: str, choice: str) -> float:
    """Each token of the choice by a forward of its own."""
    weights, ids, before = (
        AutoModelForCausalLM.from_pretrained(model),
        ids_of(f"{prompt} {choice}"),
        len(ids_of(prompt)),
    )
    return -sum(
        float(weights(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(0)[ids[place]])
        for place in range(before, len(ids))
    )


def test_an_autoregressive_model(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    model = models["autoregressive"]
    done = llmtrain("eval", model, "mc.yaml", "--samples", "rows.out")
    rows = records(done)
    right = [0, 1, 1]
    correct = dict.fromkeys(NAMES[:3], 0)
    for row, given, index in zip(rows, ROWS, right, strict=True):
        texts = [f" {choice}" for choice in given["choices"]]
        assert row["choices"] == texts and row["right"] == index and row["prompt"] == given["question"]
        nats = np.asarray([slow_nats(model, given["question"], choice) for choice in texts])
        np.testing.assert_allclose(row["nats"], nats, rtol=1e-4)
        tokens, num_bytes = (
            np.asarray([measure(text) for text in texts]) for measure in (lambda t: len(t.split()), len)
        )
        assert row["tokens"] == tokens.tolist()
        for name, scores in (("", nats), ("_per_token", nats / tokens), ("_per_byte", nats / num_bytes)):
            assert row[f"chosen{name}"] == scores.argmin()
            correct[f"accuracy{name}"] += int(scores.argmin() == index)
        assert "nats_stderr" not in row and "undecided" not in row
    found = figures(done)
    assert list(found) == NAMES and all(len(row) == 3 for row in found.values())
    assert {name: float(found[name][0]) for name in NAMES[:3]} == pytest.approx(
        {name: number / 3 for name, number in correct.items()}, rel=1e-3
    )
    loss = sum(row["nats"][row["right"]] for row in rows) / sum(row["tokens"][row["right"]] for row in rows)
    assert float(found["loss"][0]) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("kind", ["masked", "block"])
def test_diffusion_models(llmtrain: CommandLine, models: dict[str, Path], kind: str) -> None:
    """The bound of the choice, of which the prompt is no part."""
    write_task(samples=200)
    done = llmtrain("eval", models[kind], "mc.yaml", "--samples", "rows.out")
    saved = load_saved(str(models[kind]))
    for row, given in zip(records(done), ROWS, strict=True):
        prompt = len(ids_of(str(given["question"])))
        for nats, error, text in zip(row["nats"], row["nats_stderr"], row["choices"], strict=True):
            truth = expected_bound(saved, ids_of(given["question"] + text), prompt)
            assert abs(nats - truth) < 4 * error + 1e-4
        assert isinstance(row["undecided"], bool)
    found = figures(done)
    assert list(found) == [*NAMES, "undecided"]
    assert found["accuracy"][3] == "by upper bound" and found["loss"][3] == "upper bound"


def test_choices_are_seen_under_the_same_noise(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    same = {"question": "w7 w8", "choices": ["w20 w21 w22 w23"] * 2, "answer": 0}
    write_task(same, samples=2)
    row = records(llmtrain("eval", models["masked"], "mc.yaml", "--samples", "rows.out"))[0]
    assert row["nats"][0] == pytest.approx(row["nats"][1], rel=1e-6) and row["nats_stderr"][0] > 0.1
    # Of equal texts the last bit decides, which is another one on each processor.
    assert row["chosen"] == min((0, 1), key=row["nats"].__getitem__)


@pytest.mark.parametrize("kind", ["masked", "block"])
def test_replay(llmtrain: CommandLine, models: dict[str, Path], kind: str) -> None:
    write_task(method="replay", order="place")
    done = llmtrain("eval", models[kind], "mc.yaml", "--samples", "rows.out")
    assert figures(done)["accuracy"][3] == "by exact, unmasked by place"
    nats = records(done)[0]["nats"]
    write_task({**ROWS[0], "choices": ["w9", "w12 w11"]}, method="replay", order="place")
    again = records(llmtrain("eval", models[kind], "mc.yaml", "--samples", "rows.out"))[0]["nats"]
    assert again[0] == pytest.approx(nats[0], rel=1e-5) and again[1] != nats[1]


def test_other_models(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task(samples=2)
    assert list(figures(llmtrain("eval", models["uniform"], "mc.yaml"))) == [*NAMES, "undecided"]
    base = models["autoregressive"]
    of_base = records(llmtrain("eval", base, "mc.yaml", "--samples", "rows.out"))
    for kind in ("lora", "prompt_tuning"):
        write_adapter(Path(kind), base, kind)
        of_adapter = records(llmtrain("eval", kind, "mc.yaml", "--samples", "rows.out"))
        assert of_adapter[0]["nats"] != of_base[0]["nats"]


def test_templates_examples_and_chats(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    model = models["autoregressive"]
    write_task(prompt="w50 {question}", choice=" w51 {choice}", separator=" w52 ", fewshot={"data": "shots", "num": 2})
    shots = [{"question": "w60", "choices": ["w61", "w62"], "answer": "w62"}, ROWS[0]]
    Path("shots").write_text("".join(json.dumps(row) + "\n" for row in shots))
    rows = records(llmtrain("eval", model, "mc.yaml", "--samples", "rows.out"))
    assert rows[0]["prompt"] == "w50 w60 w51 w62 w52 w50 w7 w8", "a question was told its own answer"
    assert rows[2]["prompt"] == "w50 w60 w51 w62 w52 w50 w7 w8 w51 w9 w52 w50 w11"
    assert rows[2]["choices"][0] == " w51 12"
    write_task(chat=True, fewshot={"data": "shots", "num": 1})
    row = records(llmtrain("eval", model, "mc.yaml", "--samples", "rows.out"))[0]
    assert row["prompt"][1:] == [{"role": "assistant", "content": "w62"}, {"role": "user", "content": "w7 w8"}]
    assert row["choices"] == ["w9", "w10 w11"]
    # the tests' template: `w4 <what is said> </s>` a turn, and then w5
    prompt = "w4 w60 </s> w4 w62 </s> w4 w7 w8 </s> w5"
    before = [*(1 if word == "</s>" else int(word[1:]) for word in prompt.split())]
    weights = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logp = weights(torch.tensor([before])).logits[0, -1].log_softmax(0)[9]
    assert row["nats"][0] == pytest.approx(-float(logp), rel=1e-4)
    write_task(
        {"talk": [{"role": "user", "content": "w7"}], "choices": ["w8", "w9"], "answer": 0},
        prompt=None,
        messages="talk",
    )
    assert records(llmtrain("eval", model, "mc.yaml", "--samples", "rows.out"))[0]["choices"] == ["w8", "w9"]


def joining() -> PreTrainedTokenizerFast:
    """A tokenizer of characters that joins ab and bc."""
    vocabulary = {token: number for number, token in enumerate(["</s>", *"abcxyz", "ab", "bc"])}
    model = models_of_tokenizers.BPE(vocabulary, [("a", "b"), ("b", "c")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")


def test_tokens_across_the_end_of_the_prompt() -> None:
    """One choice joins the prompt's last character: then all of them are counted from that character on."""
    tokenizer = joining()

    def spans(prompt: str, *texts: str) -> list[Any]:
        asked = Asked(tokenizer.encode(prompt, add_special_tokens=False), prompt)
        return _spans(tokenizer, Record({}, "here"), asked, texts, 7, None)

    apart = spans("xa", "yy", "z")
    assert [span.counted.tolist() for span in apart] == [[False, False, True, True], [False, False, True]]
    joined = spans("xa", "b", "z")
    tokens = [tokenizer.convert_ids_to_tokens(span.ids.tolist()) for span in joined]
    assert tokens == [["x", "ab"], ["x", "a", "z"]]
    assert [span.counted.tolist() for span in joined] == [[False, True], [False, True, True]]
    assert {span.key for span in joined} == {7}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"choices": ["w8"], "answer": 0}, ["field 'choices' is no list of two choices or more"]),
        ({"choices": "w8", "answer": 0}, ["rows.jsonl:1: field 'choices' is no list", "mc.yaml:1: choices"]),
        ({"choices": ["w8", {}], "answer": 0}, ["is no list of two choices"]),
        ({"choices": ["w8", " "], "answer": 0}, ["choice 1 of 'choices' is empty"]),
        ({"choices": ["w8", "w9"], "answer": 2}, ["field 'answer' is 2: neither the number of a choice, 0 to 1, nor"]),
        ({"choices": ["w8", "w9"], "answer": "w7"}, ["field 'answer' is 'w7'", "mc.yaml:1: answer"]),
        ({"choices": ["w8", "w9"], "answer": True}, ["field 'answer' is True"]),
        ({"choices": ["w8", "w9"]}, ["no field 'answer'; fields there: question, choices"]),
        ({"options": ["w8", "w9"], "answer": 0}, ["no field 'choices'"]),
        ({"choices": ["w8", "w9 " * 70], "answer": 0}, ["1 of 1 prompts with their choices do not fit", "64 tokens"]),
    ],
)
def test_bad_rows(llmtrain: CommandLine, models: dict[str, Path], row: Any, texts: list[str]) -> None:
    write_task({"question": "w7", **row})
    assert_refused(llmtrain("eval", models["autoregressive"], "mc.yaml"), *texts, "remedy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": " w5"}, "mc.yaml:1: choice does not hold {choice}"),
        ({"choice": " {choice"}, "choice is no template"),
        ({"prompt": None}, "give exactly one of prompt and messages"),
        ({"messages": "talk"}, "give exactly one of prompt and messages"),
        ({"steps": 3}, "steps is for method replay"),
        ({"temperature": 1.0}, "temperature: unknown key 'temperature' for kind multiple_choice"),
        ({"data": "no.jsonl"}, "mc.yaml:1: data: no such file"),
        ({"chat": True}, "mc.yaml:1: chat: the tokenizer of bare has no chat template"),
    ],
)
def test_mistakes(llmtrain: CommandLine, settings: dict[str, Any], message: str) -> None:
    write_model(Path("bare"), chat=False)
    write_task(**settings)
    assert_refused(llmtrain("eval", "bare", "mc.yaml"), message)


def test_a_choice_that_is_the_mask(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task({"question": "w7", "choices": ["w8", f"w{MASK}"], "answer": 0})
    done = llmtrain("eval", models["masked"], "mc.yaml")
    assert_refused(done, "rows.jsonl:1: the choice ' w95' has no token of its own after the prompt")
