"""The scripts in launch/, run as a user runs them: one node, and two "nodes" on the loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.recipe.shipped import launch_directory
from tests.runs import assert_same, final_weights, train_here, write_recipe

SPLIT = {"batch": {"sequences": 8, "micro_sequences": 4}}


def environment(**settings: str) -> dict[str, str]:
    # torchrun and python of this environment, whatever the caller's PATH says
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | settings


def test_one_node_two_processes(tmp_path):
    recipe = write_recipe(tmp_path, **SPLIT)
    script = launch_directory() / "torchrun_single_node.sh"
    done = subprocess.run(
        [str(script), str(recipe), "seed=1"], env=environment(NPROC="2"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ddp over 2 ranks" in done.stderr
    reference = train_here(recipe, "seed=1", f"output_dir={tmp_path / 'here'}")
    assert_same(final_weights(tmp_path / "runs" / "tiny"), final_weights(reference), rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_two_nodes(tmp_path):
    recipe = write_recipe(tmp_path, **SPLIT)
    script = launch_directory() / "torchrun_multi_node.sh"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [
        subprocess.Popen(
            [str(script), str(recipe)],
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NNODES="2", NODE_RANK=str(rank), NPROC="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    reference = train_here(recipe, f"output_dir={tmp_path / 'here'}")
    assert_same(final_weights(tmp_path / "runs" / "tiny"), final_weights(reference), rtol=1e-5, atol=2e-6)
