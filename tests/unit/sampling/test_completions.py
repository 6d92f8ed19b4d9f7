"""`llmtrain generate --input --output`: a file of prompts, answered and gone on with."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.sampling import partial
from tests.saved import INTERRUPTIONS, CommandLine, assert_refused, interrupt, kept_in, write_adapter, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("completions") / "model")


def write_rows(*rows: Any, file: str = "in.jsonl") -> None:
    Path(file).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read_rows(file: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


ROWS = [
    {"prompt": "w7 w8", "id": 1},
    {"messages": [{"role": "user", "content": "w9 w10 w11"}], "id": 2, "tag": {"a": [1]}},
    {"prompt": [{"role": "system", "content": "w3"}, {"role": "user", "content": "w12"}]},
    {"prompt": "w13 " * 20},
]
FILES = ("--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", "6")


def test_rows_and_their_completions(llmtrain: CommandLine, model: Path) -> None:
    write_rows(*ROWS)
    done = llmtrain("generate", model, *FILES, "--num", 2, "--temperature", 1)
    assert done.code == 0, done.err
    assert "4 rows done" in done.out
    assert not Path("out.jsonl.partial").exists()
    rows = read_rows()
    for before, after in zip(ROWS, rows, strict=True):
        assert {key: after[key] for key in before} == before
        assert len(after["completions"]) == 2
        for completion in after["completions"]:
            assert completion["finish_reason"] in ("stop", "length")
            assert 1 <= completion["tokens"] <= 6
    assert [row["prompt_tokens"] for row in rows] == [3, 6, 7, 21]
    write_rows(*ROWS)
    os.replace("out.jsonl", "first.jsonl")
    llmtrain("generate", model, *FILES, "--num", 2, "--temperature", 1, "--batch-tokens", 1)
    assert read_rows() == rows


@pytest.mark.parametrize(("number", "code"), INTERRUPTIONS)
def test_an_interrupted_command_goes_on(
    llmtrain: CommandLine, model: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    write_rows(*ROWS)
    assert llmtrain("generate", model, *FILES).code == 0
    whole = Path("out.jsonl").read_text()
    Path("out.jsonl").unlink()
    append, entries = partial._append, []

    def killed(file: Any, entry: Any) -> None:
        if len(entries) == 3:
            file.write('{"unit": [2], "comple')  # what the kill cut off
            file.flush()
            interrupt(number)
        entries.append(entry)
        append(file, entry)

    monkeypatch.setattr(partial, "_append", killed)
    done = llmtrain("generate", model, *FILES)
    assert (done.code, done.err.splitlines()[-1]) == (code, kept_in("out.jsonl"))
    monkeypatch.setattr(partial, "_append", append)
    assert not Path("out.jsonl").exists()
    assert_refused(llmtrain("generate", model, *FILES, "--seed", 1), "out.jsonl.partial is what another command")
    done = llmtrain("generate", model, *FILES)
    assert done.code == 0
    assert "2 rows done" in done.out and "2 were done before" in done.out
    assert Path("out.jsonl").read_text() == whole


def test_prompts_that_do_not_fit(llmtrain: CommandLine, model: Path) -> None:
    write_rows({"prompt": "w3 " * 80}, *ROWS, {"prompt": "w4 " * 90})
    assert_refused(
        llmtrain("generate", model, *FILES),
        "in.jsonl:1: 2 of 6 prompts do not fit the model's window of 64 tokens; this one has 81",
        "--skip-long",
    )
    assert not Path("out.jsonl.partial").exists()
    done = llmtrain("generate", model, *FILES, "--skip-long")
    assert done.code == 0
    assert "4 rows done" in done.out and "2 did not fit" in done.out
    assert [len(row["completions"]) for row in read_rows()] == [0, 1, 1, 1, 1, 0]


def test_an_adapter_answers_too(llmtrain: CommandLine, model: Path) -> None:
    write_rows(*ROWS)
    write_adapter(Path("adapter"), model, "prefix_tuning")
    assert llmtrain("generate", "adapter", *FILES).code == 0
    os.replace("out.jsonl", "adapted.jsonl")
    assert llmtrain("generate", model, *FILES).code == 0
    assert read_rows() != read_rows("adapted.jsonl")


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ('{"prompt": "w3"', ["in.jsonl:2: not JSON"]),
        ("[1, 2]", ["in.jsonl:2: a JSON array, not an object"]),
        ({"text": "w3"}, ["in.jsonl:2: a row has either a prompt or messages; it has neither", "remedy"]),
        ({"prompt": "w3", "messages": []}, ["it has both"]),
        ({"messages": []}, ["in.jsonl:2: messages must be a list that is not empty"]),
        ({"messages": [{"content": "w3"}]}, ["in.jsonl:2: messages.0 is no message with a role and a content"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["nothing to answer"],
        ),
        ({"messages": [{"role": "judge", "content": "w3"}]}, ["the chat template does not take", "no role judge"]),
        ({"prompt": "w3", "completions": 1}, ["in.jsonl:2: field 'completions' is what the output adds"]),
        ({"prompt": "w3 \ud800"}, ["in.jsonl:2: field 'prompt' has half of a surrogate pair"]),
    ],
)
def test_bad_rows(llmtrain: CommandLine, model: Path, row: Any, texts: list[str]) -> None:
    write_rows({"prompt": "w3"}, row)
    assert_refused(llmtrain("generate", model, *FILES), *texts)


def test_files_that_are_wrong(llmtrain: CommandLine, model: Path) -> None:
    assert_refused(llmtrain("generate", model, *FILES), "--input: no such file: in.jsonl")
    write_rows("", "")
    assert_refused(llmtrain("generate", model, *FILES), "in.jsonl has no rows")
    write_rows(*ROWS)
    assert_refused(llmtrain("generate", model, *FILES[:3], "no/out.jsonl"), "--output: no such directory: no")
    Path("out.jsonl").touch()
    assert_refused(llmtrain("generate", model, *FILES), "--output: out.jsonl exists", "remedy")
    Path("in.jsonl").write_bytes(b'{"prompt": "na\xefve"}\n')
    assert_refused(llmtrain("generate", model, *FILES[:3], "new.jsonl"), "in.jsonl:1: not UTF-8")


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_done(llmtrain: CommandLine, model: Path) -> None:
    write_rows(*ROWS)
    name = "n" * 250  # and a little more while it is written
    refused = llmtrain("generate", "nothing", *FILES[:3], name)
    assert_refused(refused, f"--output: {name} cannot be made: File name too long")
    if os.path.isdir("/proc/self"):  # a disk that takes no files, whoever asks
        assert_refused(llmtrain("generate", "nothing", *FILES[:3], "/proc/self/out"), "--output: /proc/self/out cannot")


@pytest.mark.parametrize("content", ["[1]\nnot ours", "", '{"input_sha256": "of', "{}\n", "not ours"])
def test_a_partial_file_of_others_is_left_as_it_is(llmtrain: CommandLine, model: Path, content: str) -> None:
    """What ends within its first line may be ours, if it begins as that would."""
    write_rows(*ROWS)
    kept = Path("out.jsonl.partial")
    kept.write_text(content)
    done = llmtrain("generate", model, *FILES)
    if content:
        assert_refused(done, "out.jsonl.partial is what another command")
        assert kept.read_text() == content
    else:
        assert done.code == 0 and not kept.exists()


def test_a_header_that_was_cut_off_is_written_again(
    llmtrain: CommandLine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(*ROWS)
    append = partial._append

    def killed(file: Any, entry: Any) -> None:
        file.write(json.dumps(entry)[:50])
        file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(partial, "_append", killed)
    assert llmtrain("generate", model, *FILES).code == 130
    monkeypatch.setattr(partial, "_append", append)
    assert llmtrain("generate", model, *FILES).code == 0 and len(read_rows()) == len(ROWS)


def test_an_input_that_would_be_written_over_is_refused(llmtrain: CommandLine, model: Path) -> None:
    write_rows(*ROWS, file="out.jsonl.partial")
    done = llmtrain("generate", model, "--input", "./out.jsonl.partial", "--output", "out.jsonl")
    assert_refused(done, "--output: out.jsonl.partial is read", "name another output")
    assert len(read_rows("out.jsonl.partial")) == len(ROWS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has it")
def test_a_full_disk(llmtrain: CommandLine, model: Path) -> None:
    write_rows(*ROWS)
    Path("out.jsonl.partial").symlink_to("/dev/full")
    done = llmtrain("generate", model, *FILES)
    assert_refused(done, "out.jsonl.partial cannot be written: No space left on device", code=1)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--chat"],
        ["--input", "in.jsonl"],
        ["--prompt", "a", "--output", "b"],
        ["--chat", "--num", "2"],
        ["--prompt", "a", "--system", "b"],
        ["--prompt", "a", "--skip-long"],
    ],
)
def test_modes_that_do_not_go_together(llmtrain: CommandLine, model: Path, arguments: list[str]) -> None:
    done = llmtrain("generate", model, *arguments)
    assert done.code == 2
    assert "Usage: llmtrain generate" in done.err
