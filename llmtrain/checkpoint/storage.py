"""DCP's storage layer over safetensors files and JSON: no pickle anywhere, and a hash of all that is written.

DCP's own writers keep their plan in a pickle (`.metadata`), which runs code when it is read, and
neither they nor its readers notice a flipped bit.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from llmtrain.checkpoint.files import FileRecord, write_tensors
from llmtrain.checkpoint.flat import FlatSavePlanner, TensorRecord

_READERS = 4  # threads of one rank: storage answers several reads at once


def state_file(rank: int) -> str:
    """Name of the file that holds a rank's runs."""
    return f"state-rank-{rank:05d}.safetensors"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class SafetensorsWriter(StorageWriter):
    """Writes each rank's runs into one file of its own.

    Both callables run on the coordinator, inside the steps of DCP that make every rank fail where one fails.

    Args:
        directory: where to, seen by all ranks.
        rank: this process.
        prepare: makes the directory.
        publish: called when every rank has written, with the files.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        prepare: Callable[[], None],
        publish: Callable[[dict[str, FileRecord]], None],
    ):
        self._directory, self._rank, self._prepare, self._publish = directory, rank, prepare, publish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._prepare()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, FlatSavePlanner)
        if not planner.values:
            return _done([])
        name = state_file(self._rank)
        record = write_tensors(self._directory / name, planner.values)
        return _done([WriteResult(MetadataIndex(name), record.bytes, record)])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._publish({result.index.fqn: result.storage_data for share in results for result in share})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads runs, or parts of them, out of the files that `SafetensorsWriter` wrote.

    Args:
        directory: of one checkpoint, verified before.
        tensors: its tensor records.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorRecord]):
        self._directory, self._tensors = directory, tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({}, planner_data=self._tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_rank: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            record, offset = self._tensors[item.storage_index.fqn], item.storage_index.offset
            assert offset is not None
            by_rank.setdefault(record.ranks[bisect_right(record.starts, offset[0]) - 1], []).append(item)

        def read(rank: int) -> None:
            with safe_open(self._directory / state_file(rank), framework="pt") as file:
                for item in by_rank[rank]:
                    first, name = item.storage_offsets[0], item.storage_index.fqn
                    part: Tensor = file.get_slice(name)[first : first + item.lengths[0]]
                    target = planner.resolve_tensor(item)
                    # `copy_` would spread one element over all, and convert in silence.
                    if (part.shape, part.dtype) != (target.shape, target.dtype):
                        raise ValueError(
                            f"{name}: {state_file(rank)} does not hold what tensors.json says, "
                            f"{item.lengths[0]} elements of {target.dtype} from {first}"
                        )
                    target.copy_(part)

        with ThreadPoolExecutor(_READERS) as readers:
            for _ in readers.map(read, by_rank):
                pass
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
