"""Runs that are killed or told to stop, and started again with the same command."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from llmtrain.observe.metrics import read_metrics
from tests.ranks import wait_until_trained
from tests.runs import assert_same, final_weights, start, train_apart, training_state, write_recipe

SETTINGS = {"steps": 40, "checkpoint": {"every": 2, "keep": 2}, "evaluation": {"every": 10, "max_sequences": 16}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return train_apart(write_recipe(directory, **SETTINGS))


def wait_for(path, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def assert_undisturbed(run, undisturbed):
    assert_same(final_weights(run), final_weights(undisturbed))
    assert_same(training_state(run, 40), training_state(undisturbed, 40))
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(41))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_and_run_again_it_ends_the_same(undisturbed, seed, tmp_path):
    recipe = write_recipe(tmp_path, **SETTINGS)
    run = tmp_path / "runs" / "tiny"
    delay = random.Random(seed).uniform(0.0, 0.6)
    process = start(recipe)
    wait_for(run / "metrics.jsonl", process)  # from here on it trains and saves, every few milliseconds
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "final").exists() or delay > 0.3
    train_apart(recipe)
    assert_undisturbed(run, undisturbed)


KILLS = 15  # of each: 30 in all


def ranks_of(process):
    """The process ids of a run's ranks: those that torchrun started, or the run itself."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in children.stdout.split()] or [process.pid]


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path):
    recipe = write_recipe(tmp_path, **(SETTINGS | {"steps": 100000, "batch": {"sequences": 8, "micro_sequences": 4}}))
    run = tmp_path / "runs" / "tiny"
    process = start(recipe, ranks=2)
    wait_until_trained(run / "metrics.jsonl", process, 2)
    os.kill(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)  # the ranks hold its pipe open until they end
    assert "the same command goes on from there" in output
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2)])
def test_killed_again_and_again_anywhere_in_its_life_it_ends_the_same(engine, ranks, tmp_path):
    """From an empty cache: in imports, tokenizer, cache, steps, saves and the export; one rank, or all of them."""
    settings = SETTINGS | {"batch": {"sequences": 8, "micro_sequences": 4}, "engine": {"kind": engine}}
    recipe = write_recipe(tmp_path, **settings)
    started = time.monotonic()
    undisturbed = train_apart(recipe, f"output_dir={tmp_path / 'undisturbed'}", ranks=ranks)
    lifetime = time.monotonic() - started  # on this machine, as busy as it is
    environment = {"LLMTRAIN_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "runs" / "tiny"
    chooser = random.Random(ranks)
    kills = 0
    for _ in range(4 * KILLS):
        if kills == KILLS:
            break
        process = start(recipe, ranks=ranks, **environment)
        try:
            process.wait(timeout=lifetime * chooser.uniform(0.2, 0.95))
        except subprocess.TimeoutExpired:
            all_ranks = ranks_of(process)
            one = chooser.choice([process.pid, *all_ranks])  # the others must notice, and end
            for pid in [one] if chooser.random() < 0.5 else [process.pid, *all_ranks]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            kills += 1
        output, _ = process.communicate(timeout=120)
        if (run / "final").exists():
            assert_undisturbed(run, undisturbed)
            shutil.rmtree(run)
        else:
            assert process.returncode != 0, output
    assert kills == KILLS
    process = start(recipe, ranks=ranks, **environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_undisturbed(run, undisturbed)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_a_signal_leads_to_a_checkpoint_exit_75_and_resume(undisturbed, number, tmp_path):
    recipe = write_recipe(tmp_path, **(SETTINGS | {"checkpoint": {"every": 1000, "keep": 2}}))
    run = tmp_path / "runs" / "tiny"
    process = start(recipe)
    wait_until_trained(run / "metrics.jsonl", process, 2)  # a stop before the first step has nothing to save
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "the same command goes on from there" in output
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert not (run / "final").exists()
    train_apart(recipe)
    assert_undisturbed(run, undisturbed)


def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path):
    recipe = write_recipe(tmp_path, **(SETTINGS | {"steps": 4000, "batch": {"sequences": 8, "micro_sequences": 4}}))
    run = tmp_path / "runs" / "tiny"
    process = start(recipe, ranks=2)
    wait_until_trained(run / "metrics.jsonl", process, 2)  # a stop before the first step has nothing to save
    ranks = [int(pid) for pid in os.popen(f"pgrep -P {process.pid}").read().split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0  # torchrun's own: it does not pass 75 on
    assert list((run / "checkpoints").glob("step-*")), output
    assert "the same command goes on from there" in output
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert 0 < steps[-1] < 4000
