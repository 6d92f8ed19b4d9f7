"""`llmtrain data inspect` as it is typed: what is shown is what is trained."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.data.inspection import runs
from tests.tiny import tokenizer as word_tokenizer
from tests.unit.data.corpora import byte_level_tokenizer, write_lines
from tests.unit.test_cli import Run

ANSWERS = {1: "yes indeed", 2: "no \x1b[31mnot red", 3: "é 😀 ok", 4: "z " * 70 + "end", 5: "five"}


@pytest.fixture
def llmtrain(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(capfd)


def write_recipe(directory: Path, **data: Any) -> Path:
    """Fine-tuning on five short conversations and one whose answer lies beyond the row."""
    chats = [(f"ask {number}", answer) for number, answer in ANSWERS.items()] + [("long " * 60, "too late")]
    with (directory / "chats.jsonl").open("w") as file:
        for question, answer in chats:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    byte_level_tokenizer([""], vocab_size=257).save_pretrained(directory / "tokenizer")
    section = {"train": [{"kind": "jsonl", "paths": [str(directory / "chats.jsonl")]}], "chat_template": "plain"}
    recipe = {
        "name": "chats",
        "sequence_length": 96,
        "steps": 2,
        "batch": {"sequences": 2},
        "model": {"kind": "config", "architecture": "llama"},
        "tokenizer": {"kind": "pretrained", "path": str(directory / "tokenizer")},
        "data": {**section, "validation_fraction": 0.0, "max_empty_share": 0.5, **data},
        "algorithm": {"kind": "sft"},
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "constant"},
    }
    path = directory / "chats.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def figures(out: str) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in out.splitlines() if "\t" in line]
    return {name: values for name, *values in lines}


def test_help(llmtrain: Run) -> None:
    assert "inspect" in llmtrain("data", "--help").out
    assert "Example: llmtrain data inspect" in llmtrain("data", "inspect", "--help").out


def test_rows_in_a_pipe(llmtrain: Run, tmp_path: Path) -> None:
    done = llmtrain("data", "inspect", str(write_recipe(tmp_path)), "--rows", "9")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    for number, answer in ANSWERS.items():
        shown = answer.replace("\x1b", "\\x1b")
        assert re.search(f"--- example {number}: .*---\n### User:\nask {number}\n\n### Assistant:\n", done.out)
        assert f"[[{shown[:60]}" in done.out
    assert "[[yes indeed<|endoftext|>]]" in done.out
    assert re.search(r"documents?, \d+ of 96 tokens, \d+ trained ===", done.out)
    assert re.search(r"z z\]\]\n\.\.\. truncated: \d+ tokens are lost\n", done.out)
    assert re.search(r"1 documents left out ===\n--- example 6: ", done.out)
    assert re.search(r"truncated: \d+ tokens are lost, [1-9]\d* trained ones among them", done.out)
    assert "[[too late" not in done.out
    table = figures(done.out)
    assert table["documents"] == ["6"] and table["truncated"] == ["2"] and table["without a trained token"] == ["1"]
    assert "longer than a row" in done.out and "█" in done.out


def test_settings_and_options(llmtrain: Run, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    few = llmtrain("data", "inspect", recipe, "data.train_on=all", "--rows", "1", "--no-histogram")
    assert few.out.count("=== row") == 1 and "█" not in few.out and "more: --rows N" in few.out
    split = llmtrain("data", "inspect", recipe, "data.overflow=split", "data.packing=none", "--rows", "20", "--full")
    assert "tokens go on in another row" in split.out and "tokens stand in rows before" in split.out
    assert "too late" in split.out and "truncated:" not in split.out
    assert figures(split.out)["split"] == ["2"]
    stream = llmtrain("data", "inspect", recipe, "data.packing=documents", "--rows", "20")
    assert figures(stream.out)["tokens lost by it"] == ["0"] and stream.code == 0
    nothing = llmtrain("data", "inspect", recipe, "--half", "validation")
    assert "no rows are held out" in nothing.out and nothing.code == 0
    duplicates = llmtrain("data", "inspect", recipe, "data.deduplicate=true", "--rows", "0")
    assert figures(duplicates.out)["duplicates left out of the source"] == ["0"]


def test_what_train_would_refuse(llmtrain: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_empty_share=0.1)
    done = llmtrain("data", "inspect", str(recipe))
    assert done.code == 2 and "=== row 1" in done.out
    where = 1 + recipe.read_text().splitlines().index("  - kind: jsonl")
    assert f"error: {recipe}:{where}" in done.err and "data.train.0: 1 of 6 documents" in done.err
    assert f"the first is {tmp_path / 'chats.jsonl'}:6" in done.err and "remedy: raise sequence_length" in done.err


@pytest.mark.parametrize("packing", ["documents", "best_fit", "none"])
def test_texts(llmtrain: Run, tmp_path: Path, packing: str) -> None:
    texts = [f"line {i} " + "word " * (i % 40) for i in range(50)]
    write_lines(tmp_path / "corpus.txt", texts)
    overrides = [
        "data.train=[{kind: text, paths: [corpus.txt], document: line}]",
        "data.chat_template=null",
        "data.max_empty_share=0.05",
        "data.validation_fraction=0.2",
        "algorithm.kind=causal_lm",
        "optimizer.lr=1e-3",
        f"data.packing={packing}",
    ]
    for half in ("train", "validation"):
        done = llmtrain("data", "inspect", str(write_recipe(tmp_path)), *overrides, "--rows", "200", "--half", half)
        assert done.code == 0, done.err
        # All of the text is shown, and nothing twice: each row but for what it has of a document before.
        table = figures(done.out)
        shown = re.findall(r"^--- document (\d+): ", done.out, re.MULTILINE)
        assert set(shown) == {str(number + 1) for number in range(int(table["documents"][0]))}
        text = re.sub(
            r"\n?\[\[|\]\]\n?|^(---|===|\.\.\.).*\n",
            "",
            done.out.partition("documents by tokens")[0],
            flags=re.MULTILINE,
        )
        assert text.count("<|endoftext|>") == len(set(shown))


@pytest.mark.parametrize(
    ("kind", "row", "shown"),
    [
        (
            "dpo",
            {"prompt": "ask", "chosen": " good", "rejected": " bad"},
            ["ask", "- rank 1 -", "[[ good<|endoftext|>]]", "- rank 2 -", "[[ bad<|endoftext|>]]"],
        ),
        ("kto", {"prompt": "ask", "completion": " fine", "label": False}, ["ask", "- bad -", "[[ fine<|endoftext|>]]"]),
    ],
)
def test_answers_with_their_judgements(
    llmtrain: Run, tmp_path: Path, kind: str, row: dict[str, Any], shown: list[str]
) -> None:
    path = write_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    rows = [row, {**row, "prompt": "other"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    path.write_text(yaml.safe_dump(recipe | {"algorithm": {"kind": kind}}))
    out = llmtrain("data", "inspect", str(path)).out
    (lines,) = [part.splitlines()[1:] for part in re.split(r"--- example ", out) if part.startswith("1:")]
    assert lines[: len(shown)] == shown


def test_groups_that_are_left_out_are_told_by_reason(llmtrain: Run, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, max_empty_share=0.9)
    recipe = yaml.safe_load(path.read_text())
    good = [{"prompt": f"ask {n}", "chosen": " yes", "rejected": " no"} for n in range(3)]
    equal, long = {"prompt": "a", "chosen": " b", "rejected": " b"}, good[0] | {"chosen": " y" * 96}
    rows = [*good, equal, long, equal]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    path.write_text(yaml.safe_dump(recipe | {"algorithm": {"kind": "dpo"}}))
    for num in ("0", "1"):
        done = llmtrain("data", "inspect", str(path), "--rows", num)
        assert done.code == 0, done.err
        table = figures(done.out)
        assert table["left out: their chosen and rejected answers are equal"] == ["2"]
        assert table["left out: they do not fit in a row of 96 tokens"] == ["1"]
        assert "without a trained token" not in table
        assert "3 groups of answers left out ===" in done.out
        place = tmp_path / "chats.jsonl"
        assert f"2: their chosen and rejected answers are equal; the first is {place}:4\n" in done.out
        assert f"1: they do not fit in a row of 96 tokens; the first is {place}:5\n" in done.out


def test_what_train_would_refuse_of_labels(llmtrain: Run, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = [{"prompt": f"ask {n}", "completion": " fine", "label": True} for n in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"algorithm": {"kind": "kto"}}))
    done = llmtrain("data", "inspect", str(path))
    assert done.code == 2 and "=== row 1" in done.out and "all answers to train on are good" in done.err


def test_on_a_terminal(tmp_path: Path) -> None:
    """Colours, unless NO_COLOR is set."""
    recipe = write_recipe(tmp_path)
    for settings, expected in (
        ({}, "\x1b[32myes indeed<|endoftext|>"),
        ({"NO_COLOR": "1"}, "[[yes indeed<|endoftext|>]]"),
    ):
        master, terminal = pty.openpty()
        command = [sys.executable, "-m", "llmtrain", "data", "inspect", str(recipe), "--rows", "9"]
        environment = {**os.environ, "TERM": "xterm-256color", **settings}
        process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.PIPE, env=environment)
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(master, 1 << 16):
                shown += part
        except OSError:  # how a pseudo-terminal says that its other end is closed
            pass
        os.close(master)
        assert process.wait() == 0
        assert expected in shown.decode() and "\x1b[31mnot red" not in shown.decode()


def test_runs_are_cut_where_training_begins_and_ends() -> None:
    words = word_tokenizer()
    ids = words.encode("w3 w4 w5 w6", add_special_tokens=False)
    found = list(runs(words, ids, [False, True, True, False]))
    assert [run.trained for run in found] == [False, True, False]
    assert [run.text.strip() for run in found] == ["w3", "w4 w5", "w6"]


@pytest.mark.parametrize("seed", range(20))
def test_runs_join_to_the_text(seed: int) -> None:
    """Also where an edge lies between the bytes of one character."""
    text = "é 😀👩‍👩‍👧 naïve <tag>\n\tend"
    tokenizer = byte_level_tokenizer([""], vocab_size=257)  # a token a byte
    ids = tokenizer.encode(text, add_special_tokens=False)
    trained = (np.random.default_rng(seed).random(len(ids)) < 0.5).tolist()
    assert "".join(run.text for run in runs(tokenizer, ids, trained)) == text
