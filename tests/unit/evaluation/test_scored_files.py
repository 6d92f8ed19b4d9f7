"""`llmtrain generate REWARD_MODEL --score`: scores for the answers of a file."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.models.reward import Reward, save_reward
from llmtrain.sampling import partial
from tests import counting, scorers
from tests.chats import write_chat_model
from tests.diffusion import MASKED, write_diffusion_model
from tests.saved import INTERRUPTIONS, CommandLine, assert_refused, interrupt, kept_in, write_model

ROWS: list[dict[str, Any]] = [
    {"prompt": "w7 w8", "completion": " w50 w9", "id": 1},
    {"prompt": "w7", "completions": [" w9", " w50 w50 w10", {"text": " w50", "finish_reason": "stop", "tokens": 1}]},
    {"prompt": "w7", "chosen": " w50 w9", "rejected": " w10 w9", "tag": {"a": [1]}},
    {"chosen": "w50 w9 w10", "rejected": "w50 w10 w9", "prompt": None},
    {"prompt": "w7", "completions": []},
]
FILES = ("--score", "--input", "in.jsonl", "--output", "out.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    biased = counting.write(base / "biased", "outcome")
    save_reward(Reward("outcome", bias=0.25), biased)
    return {
        "outcome": counting.write(base / "outcome", "outcome"),
        "biased": biased,
        "process": counting.write(base / "process", "process", slope=-1.0, offset=2.0),
        "causal": write_model(base / "causal"),
        "diffusion": write_diffusion_model(base / "diffusion", MASKED),
    }


def write_rows(*rows: Any) -> None:
    Path("in.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read_rows(file: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def score(text: str) -> Any:
    return pytest.approx(counting.seen(counting.ids_of(text)), rel=1e-4, abs=1e-5)


def test_rows_and_their_scores(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_rows(*ROWS)
    done = llmtrain("generate", models["outcome"], *FILES)
    assert done.code == 0, done.err
    assert "4 rows scored" in done.out and not Path("out.jsonl.partial").exists()
    added = [
        {"score": score("w7 w8 w50 w9")},
        {"scores": [score("w7 w9"), score("w7 w50 w50 w10"), score("w7 w50")]},
        {"score_chosen": score("w7 w50 w9"), "score_rejected": score("w7 w10 w9")},
        {"score_chosen": score("w50 w9 w10"), "score_rejected": score("w50 w10 w9")},
        {"scores": []},
    ]
    assert read_rows() == [row | more for row, more in zip(ROWS, added, strict=True)]
    os.replace("out.jsonl", "first.jsonl")
    assert llmtrain("generate", models["outcome"], *FILES, "--batch-tokens", 1).code == 0
    assert read_rows() == [row | more for row, more in zip(ROWS, added, strict=True)]
    Path("out.jsonl").unlink()
    assert llmtrain("generate", models["biased"], *FILES).code == 0
    assert read_rows()[0]["score"] == pytest.approx(read_rows("first.jsonl")[0]["score"] - 0.25)


@pytest.mark.parametrize("how", ["product", "min", "last"])
def test_an_answer_of_nothing_that_a_model_wrote_is_one_step(
    llmtrain: CommandLine, models: dict[str, Path], how: str
) -> None:
    write_rows({"prompt": "w7", "completions": [{"text": ""}, {"text": " w90 "}]})
    assert llmtrain("generate", models["outcome"], *FILES).code == 0
    assert read_rows()[0]["scores"][0] == score("w7")
    Path("out.jsonl").unlink()
    done = llmtrain("generate", models["process"], *FILES, "--aggregate", how)
    assert done.code == 0, done.err
    [row] = read_rows()
    assert [len(found) for found in row["step_scores"]] == [1, 1]
    assert row["scores"] == [found[0] for found in row["step_scores"]]


@pytest.mark.parametrize("how", [None, "min", "last"])
def test_steps_and_their_aggregate(llmtrain: CommandLine, models: dict[str, Path], how: str | None) -> None:
    given = [" w9 w90 w50 w50 w90 w9 w9 w9 w9", " w9"]
    write_rows(
        {"prompt": "w7", "completion": given[0]},
        {"prompt": "w7", "completions": given},
        {"prompt": "w7", "chosen": given[0], "rejected": given[1]},
    )
    done = llmtrain("generate", models["process"], *FILES, *([] if how is None else ["--aggregate", how]))
    assert done.code == 0, done.err
    steps = [[counting.sigmoid(2 - x) for x in counting.steps_seen(f"w7{text} w90")] for text in given]
    assert steps[0][1] < steps[0][2] < steps[0][0]
    one = {None: math.prod, "min": min, "last": lambda found: found[-1]}[how]
    first, second, third = read_rows()
    assert first["step_scores"] == pytest.approx(steps[0], rel=1e-4)
    assert first["score"] == pytest.approx(one(steps[0]), rel=1e-4)
    assert second["step_scores"] == [pytest.approx(found, rel=1e-4) for found in steps]
    assert second["scores"] == pytest.approx([one(found) for found in steps], rel=1e-4)
    assert third["step_scores_rejected"] == pytest.approx(steps[1], rel=1e-4)
    assert third["score_chosen"] == pytest.approx(one(steps[0]), rel=1e-4)


def test_messages_and_what_was_written_to_them(llmtrain: CommandLine, tmp_path: Path) -> None:
    """Texts that answer messages are the assistant's; the answers as messages score alike."""
    tokenizer = write_chat_model(tmp_path / "chat")
    model = scorers.model("outcome", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(tmp_path / "chat")
    asked = [{"role": "user", "content": "the quick"}]
    texts = ["brown fox", "lazy dog"]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    write_rows(
        {"messages": asked, "completions": [{"text": text} for text in texts]},
        {"prompt": asked, "completions": texts},
        {"messages": asked, "completions": answers},
        {"messages": asked, "chosen": answers[0], "rejected": texts[1]},
        {"chosen": [*asked, *answers[0]], "rejected": [*asked, *answers[1]]},
    )
    done = llmtrain("generate", tmp_path / "chat", *FILES)
    assert done.code == 0, done.err
    rows = read_rows()
    expected = rows[0]["scores"]
    assert expected[0] != pytest.approx(expected[1])
    for row in rows[1:]:
        found = row.get("scores", [row.get("score_chosen"), row.get("score_rejected")])
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("number", "code"), INTERRUPTIONS)
def test_an_interrupted_command_goes_on(
    llmtrain: CommandLine,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    write_rows(*ROWS)
    weights = Path(shutil.copytree(models["outcome"], "scorer"), "model.safetensors")
    files = (*FILES, "--batch-tokens", 1)
    assert llmtrain("generate", "scorer", *files).code == 0
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
    done = llmtrain("generate", "scorer", *files)
    assert (done.code, done.err.splitlines()[-1]) == (code, kept_in("out.jsonl"))
    monkeypatch.setattr(partial, "_append", append)
    assert not Path("out.jsonl").exists()
    assert_refused(llmtrain("generate", models["biased"], *files), "out.jsonl.partial is what another command")
    made = weights.stat()
    weights.touch()  # trained again
    assert_refused(llmtrain("generate", "scorer", *files), "out.jsonl.partial is what another command")
    os.utime(weights, ns=(made.st_atime_ns, made.st_mtime_ns))
    done = llmtrain("generate", "scorer", *files)
    assert done.code == 0, done.err
    assert "2 were done before" in done.out
    assert Path("out.jsonl").read_text() == whole


def test_answers_that_do_not_fit(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    long = " w9" * 70
    write_rows({"prompt": "w7", "completion": long}, {"prompt": "w7", "completions": [" w50", long, " w9"]}, ROWS[0])
    assert_refused(
        llmtrain("generate", models["outcome"], *FILES),
        "in.jsonl:1: 2 of 5 answers with their prompts do not fit the reward model's window of 64 tokens; this one has",
        "--skip-long",
    )
    assert not Path("out.jsonl.partial").exists()
    done = llmtrain("generate", models["outcome"], *FILES, "--skip-long")
    assert done.code == 0, done.err
    assert "2 answers did not fit" in done.out
    first, second, third = read_rows()
    assert first["score"] is None and third["score"] == score("w7 w8 w50 w9")
    assert second["scores"] == [score("w7 w50"), None, score("w7 w9")]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ('{"prompt": "w3"', ["in.jsonl:2: not JSON"]),
        ('{"prompt": "w3", "completion": "w4", "note": ["\\ud800"]}', ["in.jsonl:2: field 'note[0]' has half"]),
        ({"prompt": "w3"}, ["in.jsonl:2", "this one has no answer to score"]),
        ({"prompt": "w3", "completion": None}, ["this one has no answer to score"]),
        ({"prompt": "w3", "completion": "w4", "completions": []}, ["this one has completion, completions"]),
        ({"prompt": "w3", "chosen": "w4"}, ["this one has chosen"]),
        ({"completion": "w4"}, ["in.jsonl:2: a row has either a prompt or messages; it has neither"]),
        ({"prompt": "w3", "messages": [], "completion": "w4"}, ["it has both"]),
        ({"prompt": "w3", "completion": " \n"}, ["in.jsonl:2: completion is empty"]),
        ({"prompt": "w3", "completions": ["w4", {"text": 7}]}, ["in.jsonl:2: completions[1].text is a number"]),
        ({"prompt": "w3", "completions": ["w4", ""]}, ["in.jsonl:2: completions[1] is empty"]),
        ({"prompt": "w3", "completions": "w4"}, ["in.jsonl:2: completions is a string, not an array"]),
        ({"prompt": "w3", "completions": [7]}, ["in.jsonl:2: completions[0] is a number"]),
        ({"prompt": "", "completion": "w4"}, ["in.jsonl:2: prompt is empty"]),
        ({"messages": "w3", "completion": "w4"}, ["in.jsonl:2: messages"]),
        ({"prompt": "w3", "completion": "w4", "score": 1}, ["in.jsonl:2: field 'score' is what the output adds"]),
        ({"prompt": "w3", "completion": [{"role": "assistant", "content": "w4"}]}, ["in.jsonl:2: prompt is a string"]),
        ({"messages": [{"role": "user", "content": "w3"}], "completion": "w4"}, ["in.jsonl:2", "no chat template"]),
    ],
)
def test_bad_rows(llmtrain: CommandLine, models: dict[str, Path], row: Any, texts: list[str]) -> None:
    write_rows(ROWS[0], row)
    assert_refused(llmtrain("generate", models["outcome"], *FILES), *texts, "remedy")
    assert not Path("out.jsonl.partial").exists()


def test_models_that_do_not_score(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_rows(*ROWS)
    for name in ("causal", "diffusion"):
        assert_refused(llmtrain("generate", models[name], *FILES), "which gives no score", "reward_model")
    done = llmtrain("generate", models["outcome"], *FILES, "--aggregate", "min")
    assert_refused(done, "--aggregate: min of the steps", "judges whole answers")
    assert_refused(llmtrain("generate", models["outcome"], "--prompt", "w3"), "a causal language model is wanted")


def test_an_output_that_exists_is_refused_before_anything_loads(llmtrain: CommandLine) -> None:
    write_rows(*ROWS)
    Path("out.jsonl").touch()
    assert_refused(llmtrain("generate", "no/model", *FILES), "--output: out.jsonl exists")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--temperature", "0.5"], "--temperature is for a model that writes"),
        (["--max-new-tokens", "5"], "--max-new-tokens is for a model that writes"),
        (["--num", "1"], "--num is for a model that writes"),
        (["--stop", "w3"], "--stop is for a model that writes"),
        (["--sampler", "llada"], "--sampler is for a model that writes"),
        (["--prompt", "w3"], "--prompt is for a model that writes"),
    ],
)
def test_options_of_writing_are_refused(llmtrain: CommandLine, arguments: list[str], text: str) -> None:
    done = llmtrain("generate", "model", *FILES, *arguments)
    assert done.code == 2
    assert text in " ".join(done.err.replace("│", " ").split())


def test_options_that_go_together(llmtrain: CommandLine) -> None:
    assert "--score reads" in llmtrain("generate", "model", "--score").err
    assert "--input and --output" in llmtrain("generate", "model", "--score", "--input", "in.jsonl").err
    assert "--aggregate is" in llmtrain("generate", "model", "--prompt", "w3", "--aggregate", "min").err
