"""What a script learns of runs that end in every way, and the signals that lead there."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import InputError
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.shipped import launch_directory
from tests.ranks import TIMEOUT, ranks_of, wait_for, wait_until_trained
from tests.runs import start, train_here, write_recipe

SETTINGS: dict[str, Any] = {
    "steps": 100_000,
    "batch": {"sequences": 8, "micro_sequences": 4},
    "evaluation": {"every": 1_000_000, "max_sequences": 16},
    "checkpoint": {"every": 1_000_000, "keep": 2},
}


def verdict(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "runs" / "tiny" / "verdict.json").read_text())
    return content


def begun_by_script(name: str, recipe: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """A script of launch/, as a scheduler starts it: with no signal ignored."""

    def hear_all_signals() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    # torchrun and python of this environment, whatever the caller's PATH says
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(launch_directory() / name), str(recipe), *overrides],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_all_signals,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def test_done_and_done_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for _ in range(2):
        train_here(recipe)
        content = verdict(tmp_path)
        assert (content["verdict"], content["exit_code"], content["step"], content["steps"]) == ("done", 0, 6, 6)


def test_bad_input(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "corpus.txt").unlink()
    with pytest.raises(InputError):
        train_here(recipe)
    content = verdict(tmp_path)
    assert (content["verdict"], content["exit_code"], content["steps"]) == ("bad input", 2, None)
    assert "corpus.txt" in content["message"]
    write_recipe(tmp_path)
    train_here(recipe, "seed=3")  # the directory is free for another recipe, as nothing was trained
    assert verdict(tmp_path)["verdict"] == "done"


def test_a_hangup_leads_to_a_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = start(recipe, "batch.micro_sequences=8")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until_trained(tmp_path / "runs" / "tiny" / "metrics.jsonl", process)
    process.send_signal(signal.SIGHUP)
    code, output = ended(process)
    assert code == 75, output
    content = verdict(tmp_path)
    assert (content["verdict"], content["message"]) == ("preempted", "stopped by SIGHUP")
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{content['step']:08d}").is_dir()


def test_a_killed_run_has_no_verdict(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    process = start(recipe)
    wait_until_trained(tmp_path / "runs" / "tiny" / "metrics.jsonl", process)
    process.kill()
    process.communicate()
    assert (verdict(tmp_path)["verdict"], verdict(tmp_path)["exit_code"]) == ("running", None)
    asked = [sys.executable, "-m", "llmtrain", "verdict", str(recipe)]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert told.returncode == 1 and "is running, or was killed" in told.stdout


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_the_script_returns_75_when_it_is_asked_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    process = begun_by_script("torchrun_single_node.sh", recipe, NPROC="2")
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    wait_until_trained(metrics, process)
    process.send_signal(number)
    code, output = ended(process)
    assert code == 75, output
    content = verdict(tmp_path)
    assert (content["verdict"], content["message"]) == ("preempted", "stopped by SIGTERM")
    assert f"preempted at step {content['step']} of 100000: stopped by SIGTERM (" in output
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{content['step']:08d}").is_dir()
    assert read_metrics(metrics)[-1]["step"] == content["step"]


@pytest.mark.slow
def test_the_script_returns_75_when_every_process_gets_the_signal(tmp_path: Path) -> None:
    """As scancel and the end of a Slurm job's time do it; torchrun's passing on then comes on top."""
    recipe = write_recipe(tmp_path, **SETTINGS)
    process = begun_by_script("torchrun_single_node.sh", recipe, NPROC="2")
    wait_until_trained(tmp_path / "runs" / "tiny" / "metrics.jsonl", process)
    (torchrun,) = children(process.pid)
    for pid in (*ranks_of(torchrun).values(), torchrun, process.pid):
        os.kill(pid, signal.SIGTERM)
    code, output = ended(process)
    assert code == 75, output


def test_the_script_returns_75_when_it_is_stopped_before_anything_began(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    process = begun_by_script("torchrun_single_node.sh", recipe, NPROC="1")
    wait_for(lambda: children(process.pid), process, "torchrun")
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 75, output


def test_the_script_returns_1_when_a_rank_is_killed_and_2_for_a_bad_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    process = begun_by_script("torchrun_single_node.sh", recipe, NPROC="2")
    wait_until_trained(tmp_path / "runs" / "tiny" / "metrics.jsonl", process)
    (torchrun,) = children(process.pid)
    os.kill(ranks_of(torchrun)[1], signal.SIGKILL)
    code, output = ended(process)
    assert code == 1, output
    assert verdict(tmp_path)["verdict"] == "failed"
    assert ended(begun_by_script("torchrun_single_node.sh", recipe, "stepz=1", NPROC="1"))[0] == 2


@pytest.mark.slow
def test_two_nodes_return_75_when_one_is_asked_to_stop(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SETTINGS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NNODES": "2", "NPROC": "1"}
    nodes = [begun_by_script("torchrun_multi_node.sh", recipe, **common, NODE_RANK=str(rank)) for rank in range(2)]
    wait_until_trained(tmp_path / "runs" / "tiny" / "metrics.jsonl", nodes[0])
    nodes[1].send_signal(signal.SIGUSR1)
    ends = [ended(node) for node in nodes]
    assert [code for code, _ in ends] == [75, 75], ends
    assert verdict(tmp_path)["message"] in ("stopped by another rank", "stopped by SIGTERM")


def test_a_console_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    """`llmtrain train RECIPE 2>&1 | head -1`, in which every later line has no reader."""
    recipe = write_recipe(tmp_path, steps=40)
    process = start(recipe)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.wait(TIMEOUT) == 0
    assert (tmp_path / "runs" / "tiny" / "final").is_dir()
    assert "step" in (tmp_path / "runs" / "tiny" / "logs" / "rank-0.log").read_text()


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]
