from functools import partial
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.files import write_tensors
from llmtrain.checkpoint.flat import FlatLoadPlanner, FlatSavePlanner, TensorRecord, own_runs
from llmtrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter, state_file
from llmtrain.contracts import Shard


def test_only_the_coordinator_prepares(tmp_path: Path) -> None:
    prepared: list[int] = []
    for rank in range(2):
        writer = SafetensorsWriter(tmp_path, rank, partial(prepared.append, rank), lambda files: None)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
    assert prepared == [0]


def test_a_rank_with_nothing_to_write_writes_no_file(tmp_path: Path) -> None:
    planner = FlatSavePlanner(own_runs({}))
    planner.set_up_planner({"runs": {}})
    writer = SafetensorsWriter(tmp_path, 0, lambda: None, lambda files: None)
    assert writer.write_data(planner.create_local_plan(), planner).value() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stored",
    [torch.arange(1.0), torch.arange(9.0), torch.arange(10), torch.arange(10.0).double()],
    ids=["one element", "one too few", "int64", "float64"],
)
def test_a_file_that_is_not_as_the_records_say_is_refused(tmp_path: Path, stored: torch.Tensor) -> None:
    """`copy_` would take all of these in silence."""
    write_tensors(tmp_path / state_file(0), {"w": stored})
    records = {"w": TensorRecord(dtype="F32", shape=[10], starts=[0], ranks=[0])}
    reader, planner = SafetensorsReader(tmp_path, records), FlatLoadPlanner({"w": Shard(torch.zeros(10), 0, (10,))})
    planner.set_up_planner({}, reader.read_metadata())
    planner.create_local_plan()
    with pytest.raises(ValueError, match=r"w: state-rank-00000.safetensors does not hold what tensors\.json says"):
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner)
