"""DeepSpeed engines on real gloo ranks: the checks of deepspeed_checks.py, in one launch for each number of ranks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("deepspeed_checks.py")

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; pip install 'llmtrain[deepspeed]' enables this",
    ),
    pytest.mark.timeout(900),  # the one launch is the first test's; two busy cores may take minutes for it
]

EVERY_DAY = [
    *(f"{name}[{stage}]" for name in ("equals_plain", "not_finite", "state_moves") for stage in range(4)),
    *(f"{name}[{stage}]" for name in ("cpu_offload", "mixed") for stage in (1, 2, 3)),
]
OTHERS = [
    *(f"{name}[{stage}]" for name in ("tied", "frozen", "names", "autocast") for stage in range(4)),
    *(f"{name}[{stage}]" for name in ("mixed_not_finite", "unused", "unused_offloaded") for stage in (1, 2, 3)),
    *(f"deadlines[{stage}]" for stage in (1, 2, 3)),
    *("checkpointed[1]", "checkpointed[3]", "frozen_mixed[2]", "frozen_mixed[3]", "round_robin[1]", "round_robin[2]"),
    *("loss_scale[2]", "layer_by_layer[3]"),
    *(
        "asked_equals_runs[1]",
        "asked_equals_runs[2]",
        "user_settings[2]",
        "sub_groups[3]",
        "nvme[3]",
        "secondary_shards[3]",
    ),
]
OF_ADAPTERS = [f"{name}[{stage}]" for name in ("adapters_in_layers", "prompts", "learning_rates") for stage in range(4)]
ALONE = ["equals_plain", "cpu_offload", "deadlines"]


def launch(directory: Path, launcher: list[str], *checks: str) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(directory), *checks],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout, "DeepSpeed writes to stdout"
    results: dict[str, str] = json.loads((directory / "results.json").read_text())
    return results


def on_two_ranks(directory: Path, titles: list[str]) -> dict[str, str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return launch(directory, launcher, *dict.fromkeys(title.partition("[")[0] for title in titles))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return on_two_ranks(tmp_path_factory.mktemp("two"), EVERY_DAY)


@pytest.fixture(scope="module")
def two_ranks_again(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return on_two_ranks(tmp_path_factory.mktemp("others"), OTHERS)


@pytest.fixture(scope="module")
def two_ranks_with_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return on_two_ranks(tmp_path_factory.mktemp("adapters"), OF_ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("title", OF_ADAPTERS)
def test_two_ranks_with_adapters(two_ranks_with_adapters: dict[str, str], title: str) -> None:
    assert not two_ranks_with_adapters[title], two_ranks_with_adapters[title]


def test_the_list_of_checks_is_whole(two_ranks: dict[str, str]) -> None:
    assert two_ranks.keys() == set(EVERY_DAY)


@pytest.mark.parametrize("title", EVERY_DAY)
def test_two_ranks(two_ranks: dict[str, str], title: str) -> None:
    assert not two_ranks[title], two_ranks[title]


@pytest.mark.slow
def test_the_list_of_other_checks_is_whole(two_ranks_again: dict[str, str]) -> None:
    assert two_ranks_again.keys() == set(OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("title", OTHERS)
def test_two_ranks_with_other_settings(two_ranks_again: dict[str, str], title: str) -> None:
    assert not two_ranks_again[title], two_ranks_again[title]


def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    """As for offload on one GPU; and again and again in one process, each time with a group of its own."""
    results = launch(tmp_path, [], *ALONE)
    assert len(results) == 10
    assert not any(results.values()), results
