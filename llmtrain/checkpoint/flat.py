"""The state as runs of elements: how DCP (torch.distributed.checkpoint) plans saving and loading it.

DCP works on boxes of tensors. Each of our tensors is given to it flattened, so that a shard of any
backend is a one-dimensional box, [start, start + length): FSDP's rows, ZeRO's cuts anywhere, a
replica's share of what others hold too. DCP's own overlap planning then reads any layout into any other.

DCP's plans are lists of objects, one for each run. With 5,000 tensors on 64 ranks, rank 0 would spend
26 s of each save on pickling and joining them, and hold the GIL that it trains with. So the ranks tell
rank 0 where their runs lie as plain tuples (0.4 s for all), and each keeps its plan to itself.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from llmtrain.checkpoint.files import dtype_name
from llmtrain.contracts import Shard

# Elements of a replicated tensor that one rank writes alone: cuts would cost more than they save.
_WHOLE_BELOW = 1 << 16


class TensorRecord(BaseModel):
    """Where one tensor lies: its runs of elements, in order.

    Attributes:
        dtype: as safetensors names it.
        shape: of the whole tensor.
        starts, ranks: for each run, the index of its first element and the rank whose file holds it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dtype: str
    shape: list[int]
    starts: list[int] = Field(min_length=1)
    ranks: list[int]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        ends = [*self.starts[1:], max(prod(self.shape), 1)]
        in_order = all(start < end for start, end in zip(self.starts, ends, strict=True))
        if self.starts[0] != 0 or not in_order or len(self.ranks) != len(self.starts):
            raise ValueError("the runs do not make up the tensor")
        return self


@dataclass(frozen=True)
class Run:
    """What one rank writes of one tensor: elements [start, start + len(values)) of the flattened whole."""

    values: Tensor
    start: int
    shape: tuple[int, ...]


def flat_view(name: str, tensor: Tensor) -> Tensor:
    """`tensor` as one dimension, sharing its memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: the state must be contiguous, and this has strides {tensor.stride()}")
    return tensor.detach().view(-1)


def own_runs(shards: Mapping[str, Shard]) -> dict[str, Run]:
    """What this rank writes: its shards, less what the other replicas of them write."""
    runs = {}
    for name, shard in shards.items():
        values, start = flat_view(name, shard.local), shard.start
        if shard.replicas > 1:
            first, last = _share(len(values), shard.replica, shard.replicas)
            values, start = values[first:last], start + first
        # A rank that holds nothing of a tensor says so too, or one that no rank holds would go unnoticed.
        if len(values) or not shard.local.numel():
            runs[name] = Run(values, start, shard.shape)
    return runs


def _share(length: int, replica: int, replicas: int) -> tuple[int, int]:
    """The part of `length` elements that one of the ranks that hold all of them writes."""
    if length < _WHOLE_BELOW:
        return (0, length) if replica == 0 else (0, 0)
    return length * replica // replicas, length * (replica + 1) // replicas


class FlatSavePlanner(SavePlanner):
    """Plans the writing of each rank's runs.

    Attributes:
        values: what this rank writes; copies in host memory where the save is asynchronous.
        tensors: where all tensors of all ranks lie; on the coordinator, after planning.
    """

    def __init__(self, runs: Mapping[str, Run]):
        self._places = [
            (name, dtype_name(name, run.values.dtype), run.shape, run.start, len(run.values))
            for name, run in runs.items()
        ]
        self.values: Mapping[str, Tensor] = {}
        self.tensors: dict[str, TensorRecord] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        (self.values,) = state_dict.values()

    def create_local_plan(self) -> SavePlan:
        return SavePlan([], planner_data=self._places)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError unless the ranks' runs make up each tensor, each element once."""
        wholes: dict[str, tuple[str, tuple[int, ...]]] = {}
        runs: dict[str, list[tuple[int, int, int]]] = {}
        for rank, plan in enumerate(all_plans):
            for name, dtype, shape, start, length in plan.planner_data:
                whole = wholes.setdefault(name, (dtype, shape))
                if whole != (dtype, shape):
                    raise ValueError(
                        f"{name}: rank {rank} says that it is {dtype} of shape {list(shape)}, "
                        f"and a rank before it {whole[0]} of shape {list(whole[1])}"
                    )
                runs.setdefault(name, []).append((start, length, rank))
        self.tensors = {name: _joined(name, *wholes[name], parts) for name, parts in runs.items()}
        return [SavePlan([]) for _ in all_plans], Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        raise AssertionError("what is written is in `values`")


def _joined(name: str, dtype: str, shape: tuple[int, ...], runs: list[tuple[int, int, int]]) -> TensorRecord:
    """The record of a tensor whose runs, (start, length, rank) in any order, make it up."""
    runs = sorted(run for run in runs if run[1]) or runs[:1]
    reached, size = 0, prod(shape)
    for start, length, rank in runs:
        if start < reached:
            raise ValueError(f"{name}: rank {rank} saves element {start}, which another one saves too")
        if start > reached:
            raise ValueError(f"{name}: no rank saves elements {reached} to {start - 1}")
        reached += length
    if reached != size:
        raise ValueError(f"{name}: the ranks save {reached} elements of {size}")
    starts, ranks = [run[0] for run in runs], [run[2] for run in runs]
    return TensorRecord(dtype=dtype, shape=list(shape), starts=starts, ranks=ranks)


class FlatLoadPlanner(LoadPlanner):
    """Plans reading into shards, wherever their elements lie in the checkpoint's files."""

    def __init__(self, shards: Mapping[str, Shard]):
        for name, shard in shards.items():
            # Nothing would be read into what lies outside.
            if not 0 <= shard.start <= prod(shard.shape) - shard.local.numel():
                raise ValueError(
                    f"{name}: {shard.local.numel()} elements from {shard.start} are not all in {shard.shape}"
                )
        self._targets = {name: (flat_view(name, shard.local), shard.start) for name, shard in shards.items()}
        self._plan = LoadPlan([])

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._tensors: Mapping[str, TensorRecord] = metadata.planner_data

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, (target, start) in self._targets.items():
            if len(target):
                stored = _stored_around(self._tensors[name], target.dtype, start, len(target))
                items += create_read_items_for_chunk_list(name, stored, [_chunk(start, len(target))])
        self._plan = LoadPlan(items)
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return self._plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("the state holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target, _ = self._targets[read_item.dest_index.fqn]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: what was resolved is the target itself."""


def _stored_around(record: TensorRecord, dtype: torch.dtype, start: int, length: int) -> TensorStorageMetadata:
    """What DCP plans with: the runs that hold some of the elements, and not all those of a thousand ranks."""
    size = prod(record.shape)
    first, last = bisect_right(record.starts, start) - 1, bisect_left(record.starts, start + length)
    ends = [*record.starts[first + 1 : last], record.starts[last] if last < len(record.starts) else size]
    chunks = [_chunk(start, end - start) for start, end in zip(record.starts[first:last], ends, strict=True)]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([size]), chunks)


def _chunk(start: int, length: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([start]), torch.Size([length]))
