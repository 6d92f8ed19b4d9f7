"""Any layout is written whole and read back into any other: the planners and the storage, without processes."""

import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from llmtrain.checkpoint.files import FileRecord, problem_with
from llmtrain.checkpoint.flat import (
    _WHOLE_BELOW,
    FlatLoadPlanner,
    FlatSavePlanner,
    TensorRecord,
    flat_view,
    own_runs,
)
from llmtrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter, state_file
from llmtrain.contracts import Shard
from tests.unit.checkpoint.states import assert_same_bytes, blank, cut, size, tensors, whole

Layout = Sequence[Mapping[str, Shard]]  # one for each rank


def write(directory: Path, layout: Layout) -> dict[str, TensorRecord]:
    """What DCP does on several ranks, here one after the other."""
    planners = [FlatSavePlanner(own_runs(shards)) for shards in layout]
    for planner, shards in zip(planners, layout, strict=True):
        planner.set_up_planner({"runs": {name: run.values for name, run in own_runs(shards).items()}})
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    published: list[dict[str, FileRecord]] = []
    writers = [SafetensorsWriter(directory, rank, lambda: None, published.append) for rank in range(len(layout))]
    results: list[list[WriteResult]] = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    assert {path.name for path in directory.iterdir()} == published[0].keys()
    assert all(problem_with(directory / name, record) is None for name, record in published[0].items())
    return planners[0].tensors


def read(directory: Path, records: Mapping[str, TensorRecord], shards: Mapping[str, Shard]) -> None:
    reader, planner = SafetensorsReader(directory, records), FlatLoadPlanner(shards)
    planner.set_up_planner({}, reader.read_metadata())
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plan), planner)


def even(state: Mapping[str, Tensor], ranks: int) -> Layout:
    cuts = {name: [t.numel() * rank // ranks for rank in range(ranks + 1)] for name, t in state.items()}
    return [cut(state, cuts, rank) for rank in range(ranks)]


def assert_reads_back(directory: Path, records: Mapping[str, TensorRecord], layout: Layout) -> None:
    for expected in layout:
        shards = blank(expected)
        read(directory, records, shards)
        assert_same_bytes(shards, expected)


# ------------------------------------------------------------------------------ layout to layout


@st.composite
def layouts(draw: st.DrawFn, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, list[int]]]:
    """Cuts at arbitrary positions for 1 to 5 ranks, empty shards among them; to save with, and to load with."""
    result = []
    for _ in range(2):
        ranks = draw(st.integers(1, 5))
        cuts = {}
        for name, shape in shapes.items():
            inner = draw(st.lists(st.integers(0, size(shape)), min_size=ranks - 1, max_size=ranks - 1))
            cuts[name] = [0, *sorted(inner), size(shape)]
        result.append(cuts)
    return result


SHAPES = {"a/matrix": (5, 7), "a/row": (11,), "a/scalar": (), "a/half": (2, 3, 4), "a/nothing": (0, 3)}


@settings(deadline=None, max_examples=60)
@given(layouts(SHAPES), st.integers(0, 2**31))
def test_cut_anywhere_and_read_back_cut_anywhere_else(cuts: list[dict[str, list[int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state["a/half"] = state["a/half"].bfloat16()
    saving, loading = ([cut(state, one, rank) for rank in range(len(one["a/row"]) - 1)] for one in cuts)
    with TemporaryDirectory() as name:
        records = write(Path(name), saving)
        assert_reads_back(Path(name), records, loading)
        assert_reads_back(Path(name), records, [whole(state)])


@pytest.mark.parametrize(("saved_on", "read_on"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 5), (64, 3), (2, 64)])
def test_every_kind_of_tensor_is_resharded(tmp_path: Path, saved_on: int, read_on: int) -> None:
    state = tensors(1)
    records = write(tmp_path, even(state, saved_on))
    assert_reads_back(tmp_path, records, even(state, read_on))


def test_ranks_may_hold_whole_tensors_and_nothing_of_others(tmp_path: Path) -> None:
    """As in ZeRO, whose partitions are cut without regard to where a tensor begins."""
    state = {f"x/{name}": torch.randn(50) for name in "abcd"}
    layout = [
        {"x/a": Shard(state["x/a"], 0, (50,)), "x/b": Shard(state["x/b"][:10], 0, (50,))},
        {"x/b": Shard(state["x/b"][10:], 10, (50,)), "x/c": Shard(state["x/c"], 0, (50,))},
        {"x/d": Shard(state["x/d"], 0, (50,)), "x/a": Shard(torch.zeros(0), 33, (50,))},
    ]
    records = write(tmp_path, layout)
    assert records["x/a"].ranks == [0] and records["x/b"].ranks == [0, 1] and records["x/b"].starts == [0, 10]
    assert_reads_back(tmp_path, records, [whole(state), *layout])


def test_shards_of_several_dimensions_are_runs_too(tmp_path: Path) -> None:
    """As in FSDP, whose shards are whole rows."""
    weight = torch.randn(5, 6)
    layout = [
        {"w": Shard(weight[:3], 0, (5, 6))},
        {"w": Shard(weight[3:], 18, (5, 6))},
        {"w": Shard(weight[5:], 30, (5, 6))},
    ]
    records = write(tmp_path, layout)
    assert records["w"].shape == [5, 6] and records["w"].starts == [0, 18]
    assert_reads_back(tmp_path, records, [{"w": Shard(weight, 0, (5, 6))}, *layout])


# --------------------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_share_the_writing_and_every_element_is_written_once(tmp_path: Path, replicas: int) -> None:
    state = {
        "x/large": torch.randn(_WHOLE_BELOW + 1),
        "x/larger": torch.randn(40, 5003),
        "x/small": torch.randn(_WHOLE_BELOW - 1),
        "x/scalar": torch.tensor(3.0),
        "x/nothing": torch.zeros(0),
    }
    records = write(tmp_path, [whole(state, replica, replicas) for replica in range(replicas)])
    written = [load_file(tmp_path / state_file(rank)) for rank in range(replicas)]
    for name in ("x/large", "x/larger"):
        shares = [files[name].numel() for files in written]
        assert sum(shares) == state[name].numel() and max(shares) - min(shares) <= 1
        assert records[name].ranks == list(range(replicas))
    for name in ("x/small", "x/scalar"):
        assert records[name].ranks == [0] and all(name not in files for files in written[1:])
    assert_reads_back(tmp_path, records, [whole(state)])


def test_replicated_shards_as_in_hybrid_sharding(tmp_path: Path) -> None:
    """Two groups of two: each holds the whole, cut in two."""
    weight = torch.randn(300_001)
    halves = [(0, weight[:150_007]), (150_007, weight[150_007:])]
    layout = [
        {"w": Shard(half, start, (300_001,), group, 2), "n": Shard(torch.zeros(0), 0, (0,), group, 2)}
        for group in range(2)
        for start, half in halves
    ]
    records = write(tmp_path, layout)
    assert records["w"].starts == [0, 75_003, 150_007, 225_004] and records["w"].ranks == [0, 2, 1, 3]
    assert_reads_back(tmp_path, records, [{"w": Shard(weight, 0, (300_001,))}])


# ------------------------------------------------------------------------------------------- scale


def test_what_a_rank_tells_of_its_runs_is_little(tmp_path: Path) -> None:
    """Rank 0 unpickles it for each rank in each save, while it trains."""
    names = [f"policy/optimizer.model.layers.{layer}.self_attn.q_proj.weight.exp_avg" for layer in range(500)]
    layout = [{name: Shard(torch.zeros(4), 4 * rank, (32, 2)) for name in names} for rank in range(16)]
    planners = [FlatSavePlanner(own_runs(shards)) for shards in layout]
    plans = [planner.create_local_plan() for planner in planners]
    assert len(pickle.dumps(plans[0])) < 500 * (len(names[0]) + 40)
    back, metadata = planners[0].create_global_plan(plans)
    assert all(len(pickle.dumps(plan)) < 200 for plan in back) and len(pickle.dumps(metadata)) < 300
    assert all(record.ranks == list(range(16)) for record in planners[0].tensors.values())
    loading = FlatLoadPlanner(layout[0])
    loading.set_up_planner({}, SafetensorsReader(tmp_path, planners[0].tensors).read_metadata())
    assert len(pickle.dumps(loading.create_local_plan())) < 200


# --------------------------------------------------------------------------------------- refusals


def plan(*layout: Mapping[str, Shard]) -> None:
    planners = [FlatSavePlanner(own_runs(shards)) for shards in layout]
    planners[0].create_global_plan([planner.create_local_plan() for planner in planners])


def part(start: int, end: int, shape: tuple[int, ...] = (10,), dtype: torch.dtype = torch.float32) -> dict[str, Shard]:
    return {"w": Shard(torch.zeros(end - start, dtype=dtype), start, shape)}


def test_shards_that_do_not_make_up_the_tensor_are_refused() -> None:
    plan(part(0, 4), part(4, 10))
    with pytest.raises(ValueError, match="w: no rank saves elements 4 to 5"):
        plan(part(0, 4), part(6, 10))
    with pytest.raises(ValueError, match="w: rank 1 saves element 3, which another one saves too"):
        plan(part(0, 4), part(3, 10))
    with pytest.raises(ValueError, match="w: rank 1 saves element 0, which another one saves too"):
        plan(part(0, 10), part(0, 10))  # replicas that do not say so
    with pytest.raises(ValueError, match="w: the ranks save 8 elements of 10"):
        plan(part(0, 4), part(4, 8))
    with pytest.raises(ValueError, match="w: the ranks save 12 elements of 10"):
        plan(part(0, 4), part(4, 12))  # padding
    with pytest.raises(ValueError, match="w: no rank saves elements 0 to 3"):
        plan(part(4, 10))
    with pytest.raises(ValueError, match="w: the ranks save 0 elements of 10"):
        plan(part(0, 0), part(10, 10))


def test_ranks_that_disagree_about_a_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w: rank 1 says that it is BF16 of shape \[10\], and .* F32 of shape \[10\]"):
        plan(part(0, 4), part(4, 10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"rank 1 says that it is F32 of shape \[2, 5\], and .* F32 of shape \[10\]"):
        plan(part(0, 4), part(4, 10, (2, 5)))


def test_what_cannot_be_a_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a/w: the state must be contiguous, and this has strides \(1, 3\)"):
        own_runs({"a/w": Shard(torch.zeros(2, 3).T, 0, (3, 2))})
    with pytest.raises(ValueError, match="a/w: the state must be contiguous"):
        FlatLoadPlanner({"a/w": Shard(torch.zeros(4, 3)[:, 1], 0, (4,))})
    with pytest.raises(ValueError, match=r"'a/w'.*complex64"):
        FlatSavePlanner(own_runs({"a/w": Shard(torch.zeros(2, dtype=torch.complex64), 0, (2,))}))


def test_a_shard_to_read_into_that_sticks_out_is_refused() -> None:
    """Its padding would stay as it is, in silence."""
    FlatLoadPlanner(part(4, 10))
    with pytest.raises(ValueError, match="w: 8 elements from 4 are not all in"):
        FlatLoadPlanner(part(4, 12))


def test_flat_view_shares_memory() -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    flat_view("w", weight)[5] = 1
    assert weight[1, 1] == 1
    assert flat_view("w", torch.tensor(2.0)).shape == (1,)


# ---------------------------------------------------------------------------------------- records


def test_records_that_do_not_make_up_a_tensor_are_none() -> None:
    good = {"dtype": "F32", "shape": [10], "starts": [0, 4], "ranks": [1, 0]}
    TensorRecord.model_validate(good)
    TensorRecord.model_validate(good | {"shape": [0, 3], "starts": [0], "ranks": [0]})
    wrongs: list[dict[str, list[int]]] = [
        {"starts": [0, 4, 4], "ranks": [0, 1, 2]},
        {"starts": [4, 0]},
        {"starts": [1, 4]},
        {"starts": [0, 10]},
        {"starts": [0, 4], "ranks": [0]},
        {"starts": [], "ranks": []},
        {"starts": [0, 4], "shape": [0, 3]},
    ]
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            TensorRecord.model_validate(good | wrong)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_only_the_runs_around_a_shard_are_planned(lengths: list[int], data: st.DataObject) -> None:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    total = sum(lengths)
    record = TensorRecord(dtype="F32", shape=[total], starts=starts, ranks=list(range(len(starts))))
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    planner = FlatLoadPlanner({"w": Shard(torch.zeros(end - start), start, (total,))})
    planner.set_up_planner({}, SafetensorsReader(Path(), {"w": record}).read_metadata())
    items = planner.finish_plan(planner.create_local_plan()).items
    touched = [first for first, last in pairwise([*starts, total]) if first < end and last > start]
    assert [item.storage_index.offset for item in items] == [torch.Size([first]) for first in touched]
    assert sum(item.lengths[0] for item in items) == end - start
