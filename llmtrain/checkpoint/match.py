"""Whether a checkpoint is of the state that it is to be read into, and what in it is of one rank alone."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from llmtrain.checkpoint.files import dtype_name
from llmtrain.checkpoint.flat import TensorRecord
from llmtrain.checkpoint.storage import state_file
from llmtrain.contracts import Shard
from llmtrain.distributed import gather_objects, sum_scalars
from llmtrain.errors import InputError

_RANK = "rank-"


def rank_prefix(rank: int) -> str:
    """Of the names of the tensors that belong to one rank alone."""
    return f"{_RANK}{rank:05d}/"


def of_one_rank(name: str) -> bool:
    return name.startswith(_RANK)


def read_rank_tensors(path: Path, tensors: Mapping[str, TensorRecord], rank: int) -> dict[str, Tensor]:
    """What rank `rank` saved for itself."""
    prefix = rank_prefix(rank)
    names = [name for name in tensors if name.startswith(prefix)]
    if not names:
        return {}
    with safe_open(path / state_file(rank), framework="pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name).reshape(tensors[name].shape).clone() for name in names}


def check_same_state(path: Path, tensors: Mapping[str, TensorRecord], shards: Mapping[str, Shard]) -> None:
    """Raises InputError on all ranks unless the checkpoint holds just the tensors of which the ranks hold shards."""
    differences = (_difference(name, tensors.get(name), shard) for name, shard in shards.items())
    mine = next((difference for difference in differences if difference is not None), None)
    problem = next((theirs for theirs in gather_objects(mine) if theirs is not None), None)
    names = [name for name in tensors if not of_one_rank(name)]
    takers = sum_scalars([float(name in shards) for name in names])  # a rank need not have a part of each tensor
    left = [name for name, ranks in zip(names, takers, strict=True) if not ranks]
    if problem is None and left:
        problem = f"it holds {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}, which the run has not"
    if problem is not None:
        raise InputError(
            f"the checkpoint is of another model, optimizer or precision: {problem}",
            where=str(path),
            remedy="go on with the recipe and the versions that it was saved with, or start another run (name=...)",
        )


def _difference(name: str, stored: TensorRecord | None, shard: Shard) -> str | None:
    dtype, shape = dtype_name(name, shard.local.dtype), list(shard.shape)
    if stored is None:
        return f"it holds no {name}, and the run needs {dtype} of shape {shape}"
    # A step count is a scalar on one backend and a row of one element on another.
    same_shape = stored.shape == shape or prod(stored.shape) == prod(shape) == 1
    if stored.dtype == dtype and same_shape:
        return None
    return f"for {name} it holds {stored.dtype} of shape {stored.shape}, and the run needs {dtype} of shape {shape}"
