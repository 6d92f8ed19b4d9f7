"""A real DeepSpeed engine takes over a run of two FSDP ranks from a converted checkpoint, and ends where it ends."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmtrain.checkpoint import convert
from tests.runs import RECIPE, assert_same, train_apart, training_state, write_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("universal_case.py")

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; pip install 'llmtrain[deepspeed]' enables this",
    ),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml, its run of six steps, and universal/ made of its third: tensors that lie in two files."""
    directory = tmp_path_factory.mktemp("run")
    # One decay for all, as ZeRO-3 is given one group.
    recipe = write_recipe(directory, optimizer=RECIPE["optimizer"] | {"weight_decay": 0.0})
    run = train_apart(recipe, "engine.kind=fsdp", "batch.micro_sequences=4", ranks=2)
    third = run / "checkpoints" / "step-00000003"
    convert.to_universal(third, directory / "universal")
    return directory


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.slow
def test_deepspeed_goes_on_from_it_as_we_do(stage: int, directory: Path) -> None:
    run, result = directory / "runs" / "tiny", directory / f"result-{stage}.safetensors"
    arguments = [directory / "recipe.yaml", run, directory / "universal", stage, result]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = load_file(result)
    for when, step, tolerance in (("loaded", 3, 0.0), ("trained", 6, 2e-5)):
        ours = {name: value for name, value in training_state(run, step).items() if not name.endswith(".step")}
        theirs = {name.removeprefix(f"{when}."): value for name, value in found.items() if name.startswith(when)}
        assert_same(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)
