"""`llmtrain generate`, as a user runs it, on a model that a tiny run left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain import cli
from tests.runs import train_here, write_recipe

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its model sees 32 tokens."""
    directory = tmp_path_factory.mktemp("generate")
    return train_here(write_recipe(directory, steps=20))


class Done:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def text(self) -> str:
        """What was generated, without the lines that name the prompts."""
        return "\n".join(line for line in self.out.splitlines() if "─" not in line)


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str]):
    def run_command(model: Path | str, *arguments: str, prompt: str = PROMPT) -> Done:
        try:
            code = cli.main(["generate", str(model), "--prompt", prompt, *arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run_command


def greedy(model: Path, num: int) -> str:
    tokenizer, weights = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    batch = tokenizer(PROMPT, return_tensors="pt")
    output = weights.generate(**batch, max_new_tokens=num, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers(run: Path, generate) -> None:
    done = generate(run, "--temperature", "0", "--max-new-tokens", "8")
    assert done.code == 0, done.err
    assert done.text.strip() == greedy(run / "final", 8).strip()
    assert PROMPT in done.text


def test_a_model_directory_serves_like_its_run(run: Path, generate) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "8")
    assert generate(run / "final", *settings).text == generate(run, *settings).text


def test_a_seed_means_the_same_text(run: Path, generate) -> None:
    settings = ("--temperature", "1.5", "--num", "2", "--max-new-tokens", "16")
    first = generate(run, *settings, "--seed", "1")
    assert first.code == 0
    assert "(1 of 2)" in first.out and "(2 of 2)" in first.out
    assert generate(run, *settings, "--seed", "1").text == first.text
    assert generate(run, *settings, "--seed", "2").text != first.text


def test_several_prompts(run: Path, generate) -> None:
    done = generate(run, "--prompt", "dog", "--max-new-tokens", "2")
    assert done.code == 0
    assert f"'{PROMPT}'" in done.out and "'dog'" in done.out


def test_a_prompt_that_looks_like_markup(run: Path, generate) -> None:
    done = generate(run, "--prompt", "[b]a :dog: [/]", "--max-new-tokens", "2")
    assert done.code == 0, done.err
    assert "'[b]a :dog: [/]'" in done.out


def test_an_empty_prompt_begins_a_document(run: Path, generate) -> None:
    """The tokenizer has a beginning-of-text token, with which every document was trained."""
    done = generate(run, "--max-new-tokens", "4", prompt="")
    assert done.code == 0, done.err


def test_text_ends_where_the_models_window_does(run: Path, generate) -> None:
    done = generate(run, "--max-new-tokens", "1000")
    assert done.code == 0
    assert AutoTokenizer.from_pretrained(run / "final")(done.text, return_length=True)["length"][0] <= 33


# --------------------------------------------------------------------------------------- errors


def assert_refused(done: Done, *texts: str) -> None:
    assert done.code == 2
    assert done.err.startswith("error: ") or "\nerror: " in done.err
    assert "remedy: " in done.err
    assert "Traceback" not in done.err
    for text in texts:
        assert text in done.err


def test_a_directory_that_is_not_there(run: Path, generate, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(generate(run.parent / "nothing"), "no such directory", "nothing")
    monkeypatch.chdir(run.parent.parent)
    # it looks like a hub name, but the directory above is here
    assert_refused(generate("runs/nothing"), "no such directory: runs/nothing")
    assert generate("runs/tiny", "--max-new-tokens", "1").code == 0


def test_a_hub_name_without_a_hub(generate) -> None:
    assert_refused(generate("nobody/nothing"), "nobody/nothing")


def test_a_directory_without_a_model(tmp_path: Path, generate) -> None:
    assert_refused(generate(tmp_path), "holds no model")


def test_a_run_that_is_not_finished(run: Path, tmp_path: Path, generate) -> None:
    unfinished = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    assert_refused(generate(unfinished), "not finished", "llmtrain train")


def test_an_empty_prompt_without_a_beginning_of_text(run: Path, tmp_path: Path, generate) -> None:
    copy = shutil.copytree(run / "final", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(copy)
    assert_refused(generate(copy, prompt=""), "empty prompt", "--prompt")


def test_a_prompt_longer_than_the_window(run: Path, generate) -> None:
    assert_refused(generate(run, prompt="fox " * 100), "the prompt has", "the model's window is 32", "--prompt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; this is about its absence")
def test_a_device_that_is_not_there(run: Path, generate) -> None:
    assert_refused(generate(run, "--device", "cuda"), "device cuda is asked for and there is none")


def test_weights_that_are_not_there(run: Path, tmp_path: Path, generate) -> None:
    copy = shutil.copytree(run / "final", tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert_refused(generate(copy), "1 of the model's weights are not there", "up_proj")


def test_a_prompt_that_is_not_utf8(generate) -> None:
    """Python gives a byte of the command line that is not UTF-8 as half of a surrogate pair."""
    done = generate("no/model", prompt="na\udcefve")
    assert done.code == 2
    assert done.err.startswith("error: --prompt: the prompt is not UTF-8 at character 2: ")
    assert "remedy: give it in UTF-8" in done.err


def test_a_terminal_that_is_not_utf8(run: Path) -> None:
    command = [sys.executable, "-m", "llmtrain", "generate", str(run), "--prompt", "é", "--max-new-tokens", "2"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\\xe9" in done.stdout or "\\ufffd" in done.stdout
