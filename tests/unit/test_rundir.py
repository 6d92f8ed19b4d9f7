import errno
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import llmtrain
from llmtrain.distributed import World
from llmtrain.errors import InputError, TrainingError
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import Recipe
from llmtrain.rundir import RunDirectory, claim

ALONE = World(0, 1, 0, 1, torch.device("cpu"))

RECIPE = """
name: tiny
sequence_length: 32
steps: 10
batch: {sequences: 4}
model: {kind: config, architecture: llama, config: {hidden_size: 16}}
tokenizer: {kind: sentencepiece, vocab_size: 300}
data: {train: [{kind: text, paths: [a.txt]}]}
algorithm: {kind: causal_lm}
optimizer: {lr: 0.001}
schedule: {kind: constant}
"""

HOLDER = """
import sys
from pathlib import Path
import torch
from llmtrain.distributed import World
from llmtrain.recipe.loading import load_recipe
from llmtrain.rundir import claim
run = claim(Path(sys.argv[2]), load_recipe(sys.argv[1]).recipe, World(0, 1, 0, 1, torch.device("cpu")))
print("held", flush=True)
sys.stdin.read()
"""

TWO_RANKS = """
import sys
from pathlib import Path
from llmtrain.distributed import joined
from llmtrain.errors import InputError
from llmtrain.recipe.loading import load_recipe
from llmtrain.rundir import claim
here = Path(sys.argv[1])
with joined("cpu", 60) as world:
    said = []
    for directory, override in [("run", "seed=0"), ("run", "seed=1"), (f"disk-{world.rank}", "seed=0")]:
        try:
            recipe = load_recipe(here / "tiny.yaml", [override]).recipe
            run = claim(here / directory, recipe, world)
            run.begin(recipe, 0)
            said.append(f"claimed {run.path.name}, locked: {run.lock is not None}")
            run.release()
        except InputError as error:
            said.append(error.message)
    (here / f"said-{world.rank}").write_text("|".join(said))
"""


def _recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides).recipe


def _all_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [directory, *directory.rglob("*")]
    }


def _begun(directory: Path, recipe: Recipe) -> RunDirectory:
    run = claim(directory, recipe, ALONE)
    run.begin(recipe, 0)
    run.release()
    return run


def test_a_begun_run_has_a_recipe_that_loads_back(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    run = _begun(tmp_path / "deep" / "runs" / "tiny", recipe)
    assert run.recipe.name == "recipe.resolved.yaml"
    assert load_recipe(run.recipe).recipe == recipe
    assert f'"torch": "{metadata.version("torch")}"' in run.recipe.read_text()
    assert not run.is_finished()


def test_a_claim_that_never_began_to_train_leaves_the_directory_free(tmp_path: Path) -> None:
    run = claim(tmp_path / "run", _recipe(tmp_path), ALONE)
    run.logs.mkdir()
    run.release()
    assert not run.recipe.exists()
    _begun(tmp_path / "run", _recipe(tmp_path, "seed=1"))


def test_a_continuation_leaves_the_recipe_as_it_was(tmp_path: Path) -> None:
    run = _begun(tmp_path / "run", _recipe(tmp_path))
    before = run.recipe.stat().st_mtime_ns
    _begun(tmp_path / "run", _recipe(tmp_path, "checkpoint.every=7", "batch.micro_sequences=2"))
    assert run.recipe.stat().st_mtime_ns == before


def test_another_recipes_run_is_refused_and_untouched(tmp_path: Path) -> None:
    _begun(tmp_path / "run", _recipe(tmp_path))
    before = _all_of(tmp_path / "run")
    changes = ["seed=5", "optimizer.lr=0.01", "sequence_length=64", "steps=11", "batch.sequences=2"]
    with pytest.raises(InputError) as refused:
        claim(tmp_path / "run", _recipe(tmp_path, *changes, "model.config.hidden_size=32"), ALONE)
    text = str(refused.value)
    assert "another recipe's run" in text and "and 1 more" in text and str(tmp_path / "run") in text
    assert "seed was 0, now 5" in text and "steps was 10, now 11" in text and "name=..." in text
    assert _all_of(tmp_path / "run") == before


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"name: 3"])
def test_an_unreadable_recipe_is_refused_and_untouched(tmp_path: Path, content: bytes) -> None:
    run = _begun(tmp_path / "run", _recipe(tmp_path))
    run.recipe.write_bytes(content)
    before = _all_of(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be read"):
        claim(tmp_path / "run", _recipe(tmp_path), ALONE)
    assert _all_of(tmp_path / "run") == before


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    before = _all_of(tmp_path / "run")
    with pytest.raises(InputError, match="is no run of llmtrain"):
        claim(tmp_path / "run", _recipe(tmp_path), ALONE)
    assert _all_of(tmp_path / "run") == before


def test_an_empty_directory_is_taken_and_one_that_was_killed_while_claimed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = _begun(tmp_path / "run", _recipe(tmp_path))
    run.recipe.rename(tmp_path / "run" / ".writing-recipe.resolved.yaml")
    (tmp_path / "run" / "starts.jsonl").unlink()  # written after the recipe
    _begun(tmp_path / "run", _recipe(tmp_path))
    assert run.recipe.exists()


def test_a_file_in_its_place_or_above_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the run directory is a file"):
        claim(tmp_path / "file", _recipe(tmp_path), ALONE)
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        claim(tmp_path / "file" / "run", _recipe(tmp_path), ALONE)


def test_an_unwritable_parent_is_named(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    recipe = _recipe(tmp_path)
    root = os.geteuid() == 0
    if root:  # who may write anywhere: be nobody for a moment
        for path in [tmp_path, *tmp_path.parents][:3]:
            path.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="cannot be written: Permission denied") as refused:
            claim(parent / "run", recipe, ALONE)
    finally:
        if root:
            os.seteuid(0)
    assert "output_dir" in str(refused.value.remedy) and list(parent.iterdir()) == []


def test_two_live_processes_cannot_share_a_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "tiny.yaml"), str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"):
            claim(tmp_path / "run", recipe, ALONE)
        holder.kill()  # the lock goes with the process, however it ends
    _begun(tmp_path / "run", recipe)


def test_all_ranks_agree_on_a_claim_and_on_a_refusal(tmp_path: Path) -> None:
    _recipe(tmp_path)
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # A script runs with its own directory on the path, not with the working directory.
    environment = {**os.environ, "PYTHONPATH": str(Path(llmtrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"said-{rank}").read_text().split("|") for rank in range(2))
    assert (first[0], second[0]) == ("claimed run, locked: True", "claimed run, locked: False")
    refusals = [
        "the directory holds another recipe's run: seed was 0, now 1",
        "rank 1 does not see the run directory that rank 0 sees",
    ]
    assert first[1:] == second[1:] == refusals


def test_every_start_is_recorded(tmp_path: Path) -> None:
    for step in (0, 500):
        run = claim(tmp_path / "run", _recipe(tmp_path), ALONE)
        run.begin(_recipe(tmp_path), step)
        run.release()
    first, second = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert (first["resume_step"], second["resume_step"], second["world_size"]) == (0, 500, 1)
    assert {"time", "hostname", "git", "packages"} <= set(first)


def test_final_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    run = _begun(tmp_path / "run", _recipe(tmp_path))
    with pytest.raises(RuntimeError):
        _export_and_fail(run)
    assert not run.is_finished()
    with run.writing_final() as directory:
        (directory / "config.json").write_text("{}")
        assert not run.is_finished()
    assert run.is_finished() and [path.name for path in run.final.iterdir()] == ["config.json"]
    assert not list(run.path.glob(".writing-*"))


def _export_and_fail(run: RunDirectory) -> None:
    with run.writing_final() as directory:
        (directory / "half").write_text("")
        raise RuntimeError


def test_a_model_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    run = _begun(tmp_path / "run", _recipe(tmp_path))
    with pytest.raises(TrainingError, match="run/final could not be written: No space left") as caught:
        _export_onto_a_full_disk(run)
    assert "remedy: make room" in str(caught.value)
    assert not run.is_finished() and not list(run.path.glob(".writing-*"))


def _export_onto_a_full_disk(run: RunDirectory) -> None:
    with run.writing_final() as directory:
        (directory / "half").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")
