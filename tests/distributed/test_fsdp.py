"""FSDP on real gloo ranks against plain torch in one process, which sees the whole batch.

One set of processes of two ranks and one of four run all the checks of fsdp_checks.py, since importing torch costs
more than a check. Each check is a test of its own here.

usage of a rank: python -m tests.distributed.test_fsdp RESULTS CHECK..., with the environment of torchrun
"""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from llmtrain.distributed import joined
from tests.distributed.fsdp_case import (
    DIRECTORY,
)
from tests.distributed.fsdp_checks import CHECKS, SLOW


def launch(directory: Path, ranks: int, names: list[str]) -> dict[str, str]:
    """What became of each check: "" where it holds on all ranks, else what failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = os.environ | {name: str(number) for name, number in numbers.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, so that memory can be measured
        command = [sys.executable, "-m", "tests.distributed.test_fsdp", str(directory), str(ranks), *names]
        with (directory / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    for process in processes:
        process.wait()
    logs = "\n".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(ranks))
    results = {}
    for name in names:
        files = [directory / f"{name}-{rank}" for rank in range(ranks)]
        texts = [file.read_text() if file.exists() else "never ran" for file in files]
        results[name] = "\n".join(text for text in texts if text)
        if "never ran" in texts:
            results[name] += logs
    return results


def main(directory: Path, ranks: int, names: list[str]) -> None:
    DIRECTORY.append(directory)
    with joined("cpu", 60) as world:
        for name in names:
            problem = ""
            try:
                (CHECKS[ranks] | SLOW)[name](world)
            except BaseException:  # noqa: BLE001 - whatever it is, the other ranks wait
                problem = f"rank {world.rank}:\n{traceback.format_exc()}"
            (directory / f"{name}-{world.rank}").write_text(problem)
            if problem:
                os._exit(1)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(tmp_path_factory.mktemp("two"), 2, list(CHECKS[2]))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(tmp_path_factory.mktemp("four"), 4, list(CHECKS[4]))


@pytest.mark.parametrize("check", CHECKS[2])
def test_two_ranks(of_two: dict[str, str], check: str) -> None:
    assert not of_two[check], of_two[check]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS[4])
def test_four_ranks(of_four: dict[str, str], check: str) -> None:
    assert not of_four[check], of_four[check]


@pytest.mark.slow
def test_compiled_layers(tmp_path: Path) -> None:
    result = launch(tmp_path, 2, ["compiled"])["compiled"]
    assert not result, result


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
