import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain import __version__, cli
from llmtrain.errors import InputError, TrainingError
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.shipped import comparison_names, recipe_names
from tests.unit.recipe.minimal import MINIMAL

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = [
    [],
    ["train"],
    ["quickstart"],
    ["generate"],
    ["eval"],
    ["export"],
    ["fetch"],
    ["rejection-sample"],
    ["label-steps"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["recipes"],
    ["recipes", "list"],
    ["recipes", "show"],
    ["recipes", "copy"],
    ["recipes", "validate"],
    ["data"],
    ["data", "inspect"],
    ["verdict"],
]


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def llmtrain(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Run":
    """Runs one command line in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return Run(capfd)


class Run:
    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd = capfd

    def __call__(self, *arguments: str) -> Result:
        try:
            code = cli.main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = self.capfd.readouterr()
        return Result(code, out, err)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(llmtrain: Run, command: list[str]) -> None:
    shown = llmtrain(*command, "--help")
    assert shown.code == 0
    assert f"Usage: llmtrain {' '.join(command)}".strip() in shown.out
    groups = ([], ["tokenizer"], ["recipes"], ["data"])
    assert command in groups or "Example: llmtrain" in shown.out


def test_version(llmtrain: Run) -> None:
    assert llmtrain("--version").out == f"llmtrain {__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["generate", "x"], ["recipes", "show"], ["--what"]])
def test_wrong_usage(llmtrain: Run, arguments: list[str]) -> None:
    done = llmtrain(*arguments)
    assert done.code == 2
    assert "Usage: llmtrain" in done.err
    assert "Traceback" not in done.err


# --------------------------------------------------------------------------------------- errors


def test_bad_recipe(llmtrain: Run) -> None:
    Path("bad.yaml").write_text(MINIMAL.replace("steps: 100", "steps: 100\nstepz: 1"), encoding="utf-8")
    done = llmtrain("train", "bad.yaml", "seed=x")
    assert done.code == 2
    assert done.out == ""
    first, *rest = done.err.splitlines()
    assert first == "error: 2 mistakes in recipe bad.yaml"
    assert rest[0] == "  override 'seed=x': seed: expected an integer, given the text 'x'"
    assert rest[1].startswith("  bad.yaml:4: stepz: unknown key 'stepz'; did you mean 'steps'?; allowed: ")


def test_debug_shows_the_traceback(llmtrain: Run) -> None:
    assert "Traceback" not in llmtrain("train", "nothing").err
    done = llmtrain("--debug", "train", "nothing")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("error: nothing: there is neither a file")


@pytest.mark.parametrize(
    ("error", "rank", "code", "shown"),
    [
        (InputError("no", where="a:1", remedy="go"), "0", 2, "error: a:1: no\n  remedy: go\n"),
        (TrainingError("diverged"), "0", 1, "error: diverged\n"),
        (InputError("no GPU here"), "3", 2, "[rank 3] error: no GPU here\n"),
    ],
)
def test_errors_of_a_command(
    llmtrain: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, rank: str, code: int, shown: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0)
    monkeypatch.setattr(cli, "load_recipe", fail)
    done = llmtrain("train", "quickstart")
    assert (done.code, done.out, done.err) == (code, "", shown)


def test_an_error_that_is_the_same_on_every_rank_is_printed_once(
    llmtrain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0)
    done = llmtrain("train", "nothing")
    assert (done.code, done.err) == (2, "")


def test_interrupt(llmtrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmtrain.run.train", interrupt)
    done = llmtrain("train", "quickstart", "output_dir=runs")
    assert (done.code, done.out, done.err) == (130, "", "interrupted; nothing was trained\n")
    Path("runs/quickstart/checkpoints/step-00000010").mkdir(parents=True)
    done = llmtrain("train", "quickstart", "output_dir=runs")
    assert (done.code, done.err) == (130, "interrupted; the same command goes on from the last checkpoint\n")
    assert "130 interrupted" in " ".join(llmtrain("train", "--help").out.split())

    monkeypatch.setattr(cli, "load_recipe", interrupt)
    assert llmtrain("train", "quickstart").code == 130


@pytest.mark.parametrize("device", ["numpy", "cpu", "gpu"])
def test_out_of_memory(llmtrain: Run, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def train(*_: object) -> None:
        if device == "gpu":  # as torch raises it for one
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        np.empty(10**15) if device == "numpy" else torch.empty(10**15)

    monkeypatch.setattr("llmtrain.run.train", train)
    done = llmtrain("train", "quickstart")
    assert done.code == 1
    assert done.err.startswith("error: out of memory: ") and "remedy: lower batch.micro_sequences" in done.err
    assert "Traceback" not in done.err and "please report" not in done.err


def test_names_that_no_file_can_have(llmtrain: Run) -> None:
    name = "x" * 300
    for arguments in (
        ["generate", name, "--prompt", "a"],
        ["recipes", "show", name],
        ["recipes", "copy", "quickstart", name],
        ["tokenizer", "train", "quickstart", "--output", name],
        ["train", "quickstart", f"output_dir={name}"],
    ):
        done = llmtrain(*arguments)
        assert done.code == 2
        assert done.err.startswith("error: ") and "Traceback" not in done.err


def test_an_unknown_error_keeps_its_traceback_and_asks_for_a_report() -> None:
    program = "from llmtrain import cli; cli.load_recipe = lambda *_: 1 / 0; cli.main(['train', 'x'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "please report" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr


# -------------------------------------------------------------------------------------- recipes


def in_terminal(columns: int, *arguments: str) -> str:
    """What a command writes on a real terminal of that width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "llmtrain", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        env={**environment, "TERM": "xterm"},
    ) as process:
        os.close(follower)
        written = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal says that the other side has gone
            while chunk := os.read(leader, 65536):
                written += chunk
    os.close(leader)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("output", "code", "told"),
    [
        ("> /dev/full", 1, "error: standard output cannot be written: No space left on device\n  remedy: make room"),
        (">&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_a_table_that_cannot_be_printed(output: str, code: int, told: str) -> None:
    """Nobody reads a closed output, and its reader may leave; of what was to be kept an error tells."""
    script = f'set -o pipefail; "$@" {output}'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "llmtrain", "recipes", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(told) and (told or not done.stderr)


def test_list_in_a_pipe(llmtrain: Run) -> None:
    lines = [line.split("\t") for line in llmtrain("recipes", "list").out.splitlines()]
    assert lines[0] == ["name", "description", "architecture", "algorithm"]
    assert [line[0] for line in lines[1:]] == [*recipe_names(), *comparison_names()]
    assert lines[1][2:] == ["llama", "causal_lm"]


@pytest.mark.parametrize("columns", [40, 100, 200])
def test_list_in_a_terminal_of_any_width(columns: int) -> None:
    shown = in_terminal(columns, "recipes", "list")
    for name in recipe_names():
        assert name in shown
        for word in load_recipe(name).recipe.description.split():
            assert word in shown
    assert "…" not in shown


def test_show(llmtrain: Run) -> None:
    assert llmtrain("recipes", "show", "quickstart").out == load_recipe("quickstart").path.read_text(encoding="utf-8")
    assert "quickstart" in in_terminal(80, "recipes", "show", "quickstart")
    resolved = llmtrain("recipes", "show", "pretrain/mixture", "--resolved").out
    Path("resolved.yaml").write_text(resolved, encoding="utf-8")
    assert load_recipe("resolved.yaml").recipe == load_recipe("pretrain/mixture").recipe
    assert llmtrain("recipes", "show", "quikstart").code == 2
    Path("latin.yaml").write_bytes(b"name: na\xefve")
    assert llmtrain("recipes", "show", "latin.yaml").out == "name: na\ufffdve"


def test_copy(llmtrain: Run) -> None:
    done = llmtrain("recipes", "copy", "pretrain/llama-12m")
    assert done.code == 0
    assert "llmtrain train llama-12m.yaml" in done.out
    source = load_recipe("pretrain/llama-12m").path.read_bytes()
    assert Path("llama-12m.yaml").read_bytes() == source

    Path("llama-12m.yaml").write_text("mine", encoding="utf-8")
    again = llmtrain("recipes", "copy", "pretrain/llama-12m")
    assert again.code == 2
    assert again.err == "error: DEST: llama-12m.yaml exists\n  remedy: name a new file, or remove it first\n"
    assert Path("llama-12m.yaml").read_text(encoding="utf-8") == "mine"

    Path("folder").mkdir()
    assert llmtrain("recipes", "copy", "pretrain/llama-12m", "folder").code == 0
    assert llmtrain("recipes", "copy", "pretrain/llama-12m", "other.yaml").code == 0
    assert Path("folder/llama-12m.yaml").read_bytes() == Path("other.yaml").read_bytes() == source
    nowhere = llmtrain("recipes", "copy", "quickstart", "no/such/folder.yaml")
    assert nowhere.code == 2
    assert nowhere.err == "error: DEST: no/such/folder.yaml cannot be written: No such file or directory\n"


def test_validate(llmtrain: Run) -> None:
    Path("good.yaml").write_text(MINIMAL, encoding="utf-8")
    Path("bad.yaml").write_text(MINIMAL.replace("steps: 100", "steps: -1"), encoding="utf-8")
    good = "ok: good.yaml: 100 steps, global batch 8 x 128 = 1,024 tokens, "
    assert llmtrain("recipes", "validate", "good.yaml").out == (
        f"{good}1 rank x 1 accumulation x 8 micro, 102,400 tokens in all\n"
    )
    both = llmtrain("recipes", "validate", "good.yaml", "bad.yaml", "batch.micro_sequences=1", "--world-size", "4")
    assert both.code == 2
    assert both.out == f"{good}4 ranks x 2 accumulation x 1 micro, 102,400 tokens in all\n"
    assert both.err == "error: bad.yaml:3: steps: must be greater than 0, given -1\n"
    epochs = llmtrain("recipes", "validate", "good.yaml", "steps=null", "epochs=1.5").out
    assert epochs.startswith("ok: good.yaml: 1.5 epochs, ")
    assert not epochs.rstrip().endswith("in all")
    uneven = llmtrain("recipes", "validate", "good.yaml", "--world-size", "3")
    assert (uneven.code, uneven.err) == (
        2,
        "error: good.yaml:4: batch.sequences: 8 does not divide over 3 ranks: use 6 or 9\n",
    )
    assert llmtrain("recipes", "validate", "steps=3").err.startswith("error: RECIPE: no recipe is named")


# ------------------------------------------------------------------------------------ tokenizer


def test_tokenizer_train(llmtrain: Run) -> None:
    from transformers import AutoTokenizer

    Path("a.txt").write_text("the cat sat on the mat and looked at the other cat\n" * 200, encoding="utf-8")
    Path("recipe.yaml").write_text(MINIMAL, encoding="utf-8")
    done = llmtrain("tokenizer", "train", "recipe.yaml", "--output", "made/tokenizer")
    assert done.code == 0, done.err
    assert "made/tokenizer" in done.out
    tokenizer = AutoTokenizer.from_pretrained("made/tokenizer")
    assert tokenizer.decode(tokenizer.encode("the cat — ✓", add_special_tokens=False)) == "the cat — ✓"

    again = llmtrain("tokenizer", "train", "recipe.yaml", "--output", "made/tokenizer")
    assert again.code == 2
    assert "error: --output: made/tokenizer is not an empty directory" in again.err


def test_tokenizer_train_of_a_recipe_that_takes_one(llmtrain: Run) -> None:
    done = llmtrain("tokenizer", "train", "pretrain/smollm2-135m-yarn", "--output", "made")
    assert done.code == 2
    assert "smollm2-135m-yarn.yaml:13: tokenizer.kind: kind model is not trained\n  remedy: " in done.err
    assert not Path("made").exists()
