import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
import torch

from llmtrain.contracts import Sample
from llmtrain.distributed import World
from llmtrain.observe.flops import Peak
from llmtrain.observe.metrics import read_metrics
from llmtrain.observe.observer import Observer

CPU = torch.device("cpu")
PEAK = Peak(1e9, "test")

SCRIPT = """
import logging, sys, time
from pathlib import Path
import torch
from llmtrain.contracts import Sample
from llmtrain.distributed import World
from llmtrain.observe.flops import Peak
from llmtrain.observe.logs import setup_logging
from llmtrain.observe.observer import Observer
directory = Path(sys.argv[1])
setup_logging(directory / "logs", 0)
world = World(0, 1, 0, 1, torch.device("cpu"))
with Observer(directory, world, 60, 0, Peak(1e9, "test"), 1e5, False) as observer:
    for step in range(1, 61):
        observer.step({"step": step, "loss": 1 / step, "step_tokens": 10, "step_seconds": 0.01})
        time.sleep(0.01)
        if step == 30:
            observer.evaluation(step, {"loss": 3.25, "perplexity": 25.79, "bits_per_byte": 1.5})
            observer.samples(step, [Sample("Once upon", " a time [bold]there[/bold]\\nwas")])
            logging.getLogger("llmtrain").warning("careful")
"""


def _record(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 100 * step,
        "step_tokens": 100,
        "step_seconds": 0.5,
        "skipped": 0,
    }


def _observer(directory: Path, world: World, resume_step: int = 0, tensorboard: bool = False) -> Observer:
    return Observer(directory, world, 10, resume_step, PEAK, 1e6, tensorboard)


def test_the_figures_that_are_added(tmp_path: Path) -> None:
    with _observer(tmp_path, World(0, 4, 0, 4, CPU)) as observer:
        observer.step({"step": 0, "eval_loss": 9.0})
        observer.step({**_record(1), "eval_loss": 3.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert set(first) == {"step", "eval_loss", "peak_memory_bytes"}
    assert second["tokens_per_second"] == 200
    assert second["mfu"] == pytest.approx(1e6 * 200 / 4e9)
    assert second["peak_memory_bytes"] > 1e7 and second["eval_loss"] == 3.0


def test_a_resume_drops_the_figures_and_samples_beyond_its_checkpoint(tmp_path: Path) -> None:
    world = World(0, 1, 0, 1, CPU)
    for resume_step, last in ((0, 6), (4, 7)):
        with _observer(tmp_path, world, resume_step, tensorboard=True) as observer:
            for step in range(resume_step + 1, last + 1):
                observer.step(_record(step))
                observer.samples(step, [Sample("p", f"from {resume_step}")])
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["completion"] for sample in samples] == ["from 0"] * 4 + ["from 4"] * 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with _observer(tmp_path, World(1, 2, 1, 2, CPU), tensorboard=True) as observer:
        observer.step(_record(1))
        observer.evaluation(1, {"loss": 1.0})
        observer.samples(1, [Sample("p", "c")])
        observer.note("text")
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_lines_are_plain(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("step 1/60, loss 1.0000, ")
    assert "evaluation at step 30/60: loss 3.25, perplexity 25.79, bits per byte 1.5" in lines
    assert lines[lines.index("sample at step 30:") + 1 :][:2] == ["    Once upon a time [bold]there[/bold]", "    was"]
    assert "warning: careful" in lines and lines[-1].startswith("step 60/60, ")
    assert "evaluation at step 30/60" in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(("columns", "no_color"), [(30, False), (100, False), (100, True)])
def test_on_a_terminal_the_line_stays_below_what_is_said(tmp_path: Path, columns: int, no_color: bool) -> None:
    shown = _on_a_terminal([sys.executable, "-c", SCRIPT, str(tmp_path)], columns, no_color)
    if columns == 100:  # narrower, there is no bar to colour
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown)) != no_color
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").split("\n")]
    assert max(len(line) for line in lines) <= columns
    flat = " ".join(lines)
    assert "perplexity 25.79" in flat and "warning: careful" in flat and "[bold]there[/bold]" in flat
    assert "step 60/60" in next(line for line in reversed(lines) if line)


def _on_a_terminal(command: list[str], columns: int, no_color: bool) -> str:
    """What a program writes to a terminal of that width."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # EIO: the program has closed its end
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    return shown.decode()
