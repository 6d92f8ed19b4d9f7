"""`llmtrain generate` on diffusion models, as a user runs it."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from llmtrain.models.saved import load_saved
from llmtrain.sampling.batched import Request, Sampling
from llmtrain.sampling.diffusion import DiffusionGenerator, Step
from llmtrain.sampling.samplers import Unmasking
from llmtrain.sampling.watching import picture, watched
from tests.diffusion import BLOCK, MASK, MASKED, UNIFORM, write_diffusion_model
from tests.saved import CommandLine, assert_refused, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("commands")
    kinds = {"masked": MASKED, "block": BLOCK, "uniform": UNIFORM}
    return {name: write_diffusion_model(directory / name, kind) for name, kind in kinds.items()} | {
        "autoregressive": write_model(directory / "autoregressive")
    }


def texts(out: str) -> list[str]:
    """What was generated, without the lines that name the prompts."""
    return [line for line in out.splitlines() if "─" not in line]


@pytest.mark.parametrize("name", ["masked", "block", "uniform"])
def test_a_prompt_goes_on(llmtrain: CommandLine, models: dict[str, Path], name: str) -> None:
    settings = ("--prompt", "w20 w21", "--max-new-tokens", 12, "--num", 2)
    done = llmtrain("generate", models[name], *settings)
    assert done.code == 0, done.err
    assert all(text.startswith("w20 w21 w") for text in texts(done.out)) and len(texts(done.out)) == 2
    assert "tokens of a text a forward" in done.err and "forwards" in done.err
    assert llmtrain("generate", models[name], *settings).out == done.out
    assert llmtrain("generate", models[name], *settings, "--seed", 1).out != done.out


def test_holes_are_filled(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    done = llmtrain("generate", models["masked"], "--prompt", "w20 <|mask:2|> w23 w95 w25", "--temperature", 0)
    assert done.code == 0, done.err
    [text] = texts(done.out)
    words = text.split()
    assert len(words) == 6 and [words[place] for place in (0, 3, 5)] == ["w20", "w23", "w25"]
    assert "w95" not in words
    assert "3 places written in" in done.err
    assert_refused(llmtrain("generate", models["autoregressive"], "--prompt", "w20 <|mask:2|>"), "autoregressive")


def test_samplers_of_the_command_line(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    def forwards(name: str, *options: object) -> int:
        done = llmtrain("generate", models[name], "--prompt", "w20 w21", "--max-new-tokens", 16, *options)
        assert done.code == 0, done.err
        return int(done.err.split(" forwards")[0].split()[-1])

    assert forwards("masked", "--steps", 4) == 4
    assert forwards("masked", "--sampler", "ancestral", "--steps", 1) == 1
    assert forwards("masked", "--threshold", 0.01, "--block-length", 8) == 2
    assert forwards("masked", "--remasking", "random", "--cfg", 0.5, "--cache") == 16
    assert forwards("block", "--sampler", "threshold", "--threshold", 0.01, "--no-cache") == 5
    assert forwards("uniform", "--steps", 3) == 3


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("autoregressive", ("--steps", 4), ("--steps", "autoregressive")),
        ("autoregressive", ("--watch",), ("--watch", "autoregressive")),
        ("block", ("--block-length", 4), ("--block-length", "blocks of 4 tokens")),
        ("block", ("--cfg", 1), ("--cfg", "masked diffusion")),
        ("uniform", ("--cache",), ("--cache", "uniform noise")),
        ("masked", ("--sampler", "first-hitting", "--steps", 4), ("--steps", "llada and ancestral")),
    ],
)
def test_options_that_do_not_fit(
    llmtrain: CommandLine, models: dict[str, Path], name: str, options: tuple[object, ...], texts: tuple[str, ...]
) -> None:
    assert_refused(llmtrain("generate", models[name], "--prompt", "w20", *options), *texts, "remedy: ")


def test_usage(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    for wrong in (("--chat", "--watch"), ("--prompt", "w7", "--threshold", 0), ("--prompt", "w7", "--sampler", "x")):
        assert llmtrain("generate", models["masked"], *wrong).code == 2
    done = llmtrain("generate", "--help")
    assert "Diffusion models" in done.out and "<|mask:2|>" in done.out


def test_files(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    rows = [
        {"prompt": "w20 w21", "id": 1},
        {"prompt": "w20 <|mask:2|> w23"},
        {"messages": [{"role": "user", "content": "w30"}]},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--input", "in.jsonl", "--output")
    for name in ("masked", "block"):
        settings = ("--max-new-tokens", 6, "--num", 2)
        done = llmtrain("generate", models[name], *files, f"{name}.jsonl", *settings)
        assert done.code == 0, done.err
        assert "3 rows done" in done.out and "tokens of a text a forward" in done.err
        found = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        assert [row["prompt_tokens"] for row in found] == [3, 5, 4]
        for row in found:
            assert len(row["completions"]) == 2
        for completion in found[1]["completions"]:
            assert (completion["finish_reason"], completion["tokens"]) == ("filled", 2)
            assert completion["text"].split()[0] == "w20" and completion["text"].split()[-1] == "w23"
        again = llmtrain("generate", models[name], *files, "again.jsonl", *settings, "--batch-tokens", 1)
        assert again.code == 0 and Path("again.jsonl").read_text() == Path(f"{name}.jsonl").read_text()
        Path("again.jsonl").unlink()


def test_a_file_goes_on_with_its_own_sampler_only(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    Path("in.jsonl").write_text('{"prompt": "w20"}\n')
    settings = ("--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", 4)
    saved = load_saved(str(models["masked"]))
    from llmtrain.sampling.completions import _header

    generator = DiffusionGenerator(saved, (), Sampling(4, 0.8), Unmasking("llada", steps=2, block_length=32))
    header = _header(saved, Path("in.jsonl"), generator.settings(), 1, False)
    Path("out.jsonl.partial").write_text(json.dumps(header) + "\n")
    assert_refused(llmtrain("generate", models["masked"], *settings), "another command")
    assert llmtrain("generate", models["masked"], *settings, "--steps", 2).code == 0


def test_messages_hold_no_holes(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    Path("in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w30 w95"}]}) + "\n")
    done = llmtrain("generate", models["masked"], "--input", "in.jsonl", "--output", "out.jsonl")
    assert_refused(done, "mask token", "in.jsonl:1")


@pytest.mark.parametrize("name", ["masked", "block"])
def test_a_conversation(
    llmtrain: CommandLine, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w20 w21\nw22\n"))
    done = llmtrain("generate", models[name], "--chat", "--temperature", 0, "--max-new-tokens", 5)
    assert done.code == 0, done.err
    saved = load_saved(str(models[name]))
    unmasking = Unmasking("llada", block_length=32) if name == "masked" else Unmasking("first-hitting", cache=True)
    found: list[str] = []
    ids = saved.tokenizer.encode("w4 w20 w21 </s> w5", add_special_tokens=False)
    DiffusionGenerator(saved, (1,), Sampling(5), unmasking).generate(
        [Request(ids, 1)], lambda _, completion: found.append(completion.text)
    )
    assert done.out.splitlines()[0] == found[0]
    assert len(done.out.splitlines()) == 2


# ---------------------------------------------------------------------------------- the terminal view


def test_watching_prints_the_text_in_the_end(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    for name in ("masked", "uniform"):
        settings = ("--prompt", "w20 w21", "--max-new-tokens", 8)
        plain = llmtrain("generate", models[name], *settings)
        done = llmtrain("generate", models[name], *settings, "--watch")
        assert done.code == 0, done.err
        assert done.out == plain.out  # on a pipe there is no place to draw in


def test_a_picture_of_a_step(models: dict[str, Path]) -> None:
    tokenizer = load_saved(str(models["masked"])).tokenizer
    step = Step([20, MASK, MASK, 23, 24, MASK], [False, True, True, False, False, True], [False] * 4 + [True, False])
    text = picture(tokenizer, step, 1, frozenset({1}), noise=False)
    assert text.plain == "w20 ░░ w23 w24 ░"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans if "green" in str(span.style)] == [
        (" w24", "bold green")
    ]
    ended = Step([1, 20, 1, 24, MASK], [False] * 4 + [True], [False] * 5)
    assert picture(tokenizer, ended, 2, frozenset({1}), noise=False).plain.split() == ["w20"]
    noisy = picture(load_saved(str(models["uniform"])).tokenizer, step, 1, frozenset(), noise=True)
    assert noisy.plain == "w20 w95 w95 w23 w24 w95"


def test_the_view_is_drawn_step_by_step_and_leaves_nothing(models: dict[str, Path]) -> None:
    saved = load_saved(str(models["masked"]))
    generator = DiffusionGenerator(saved, (), Sampling(6), Unmasking("llada", steps=3))
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with watched(generator, saved.tokenizer, console):
        generator.generate([Request([20, 21])], lambda _, completion: None)
    drawn = file.getvalue()
    assert "w20" in drawn and "░" in drawn and "\x1b[2K" in drawn  # and each line is erased
    assert generator.on_step is None
