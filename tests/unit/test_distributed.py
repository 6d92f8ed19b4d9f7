"""Ranks from the environment, and the collectives, with one rank and with two."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain import distributed
from llmtrain.contracts import Sum
from llmtrain.distributed import (
    World,
    average,
    choose_device,
    joined,
    lost_ranks_told,
    on_any_rank,
    ranks_from_environment,
    sum_scalars,
)
from llmtrain.errors import InputError, RankLost, TrainingError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}

TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
from llmtrain import distributed
from llmtrain.contracts import Sum
with distributed.joined("cpu", 60) as world:
    rank = world.rank
    averages = distributed.average({
        "loss": Sum(torch.tensor(3.0 + rank), 1.0 + 2 * rank),
        "plain": Sum(10.0 * rank, 4.0),
        "nothing": Sum(torch.tensor(0.0), 0.0),
        "one_rank_only": Sum(float(rank), float(rank)),
    })
    results = {
        "world": [rank, world.size, world.local_rank, world.local_size, str(world.device), world.is_main],
        "sums": distributed.sum_scalars([1.0 + rank, 2.0 ** 53, 0.1 * rank]),
        "averages": {name: str(value) for name, value in averages.items()},
        "from_rank_0": distributed.broadcast_object({"rank": rank}),
        "gathered": distributed.gather_objects([rank, "x" * rank]),
    }
    distributed.barrier()
assert not torch.distributed.is_initialized()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
"""


# ------------------------------------------------------------------------------ the environment


def test_ranks_as_torchrun_announces_them() -> None:
    assert ranks_from_environment(TORCHRUN) == (5, 8, 1, 4)
    assert ranks_from_environment({"HOME": "/"}) == (0, 1, 0, 1)


@pytest.mark.parametrize("missing", TORCHRUN)
def test_an_announcement_that_lacks_something(missing: str) -> None:
    given = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(InputError, match=f"environment: .* set but not {missing}") as caught:
        ranks_from_environment(given)
    assert caught.value.remedy is not None and "torchrun" in caught.value.remedy


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "five"}, "ranks must be integers.*five"),
        ({"WORLD_SIZE": ""}, "ranks must be integers"),
        ({"RANK": "8"}, "do not fit each other: RANK=8, WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_ranks_that_cannot_be(changed: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranks_from_environment(TORCHRUN | changed)


def test_devices() -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device("auto", 0) == torch.device("cuda", 0)
        with pytest.raises(InputError, match="has no GPU"):
            choose_device("cuda", torch.cuda.device_count())
    else:
        assert choose_device("auto", 3) == torch.device("cpu")
        with pytest.raises(InputError, match="device cuda is asked for") as caught:
            choose_device("cuda", 0)
        assert caught.value.remedy == "use auto or cpu"


# ------------------------------------------------------------------------------------ one rank


def test_one_process_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with joined("cpu", 60) as world:
        assert world == World(0, 1, 0, 1, torch.device("cpu"))
        assert world.is_main
        assert not torch.distributed.is_initialized()
        assert sum_scalars([1, 2.5]) == [1.0, 2.5]
        assert distributed.broadcast_object("x") == "x"
        assert distributed.gather_objects("x") == ["x"]
        distributed.barrier()


def test_averages() -> None:
    figures = average({"loss": Sum(torch.tensor(6.0, requires_grad=True), 4.0), "accuracy": Sum(3, 4.0)})
    assert figures == {"loss": 1.5, "accuracy": 0.75}
    assert average({}) == {}


def test_an_average_of_nothing_is_nan() -> None:
    figures = average({"a": Sum(torch.tensor(0.0), 0.0), "b": Sum(2.0, 1.0)})
    assert math.isnan(figures["a"])
    assert figures["b"] == 2.0


# ----------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two gloo ranks found."""
    here = tmp_path_factory.mktemp("ranks")
    (here / "program.py").write_text(TWO_RANKS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py", str(here)],
        cwd=here,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((here / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_know_where_they_stand(ranks: list[dict]) -> None:
    assert [found["world"] for found in ranks] == [[0, 2, 0, 2, "cpu", True], [1, 2, 1, 2, "cpu", False]]


def test_two_ranks_sum_in_float64(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["sums"] == [3.0, 2.0**54, 0.1]


def test_two_ranks_divide_once(ranks: list[dict]) -> None:
    """(3 + 4) / (1 + 3), and not the mean of 3 / 1 and 4 / 3."""
    for found in ranks:
        assert found["averages"] == {"loss": "1.75", "plain": "1.25", "nothing": "nan", "one_rank_only": "1.0"}


def test_two_ranks_exchange_objects(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["from_rank_0"] == {"rank": 0}
        assert found["gathered"] == [[0, ""], [1, "x"]]


# ---------------------------------------------------------------------------------- lost ranks


def test_a_collective_that_fails_tells_of_a_lost_rank() -> None:
    """As gloo says it; with real ranks that are killed, in tests/faults."""
    gloo = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4711. More."
    with pytest.raises(RankLost, match=r"^a collective failed: Connection closed by peer \[10"), lost_ranks_told():
        raise RuntimeError(gloo)
    with pytest.raises(RankLost, match="a collective failed: remote process exited"), lost_ranks_told():
        raise torch.distributed.DistBackendError("remote process exited")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, lost_ranks_told():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert type(caught.value) is RuntimeError


def test_alone_any_rank_is_this_one() -> None:
    assert on_any_rank(True) and not on_any_rank(False)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29511"}, TrainingError, "no-such-host.invalid:29511"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, InputError, "meet at 127.0.0.1:abc"),
        ({}, InputError, r"meet at \(MASTER_ADDR is not set\):\(MASTER_PORT is not set\)"),
    ],
)
def test_ranks_that_cannot_meet(
    address: dict[str, str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ranks | address).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=message) as caught, joined("cpu", 2):
        pass
    assert "remedy" in str(caught.value)
