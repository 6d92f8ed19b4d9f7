"""A checkpoint that is not of this run's state is refused, and the error says in what they differ."""

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.files import problem_with
from llmtrain.checkpoint.manifest import read_manifest
from llmtrain.contracts import Shard
from llmtrain.errors import InputError
from tests.unit.checkpoint.states import blank, save, store_in, tensors, whole

STATE = blank(whole(tensors(1)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(store_in(tmp_path), 1)


def refusal(path: Path, shards: dict[str, Shard]) -> str:
    before = {name: shard.local.clone() for name, shard in shards.items()}
    with pytest.raises(InputError) as caught:
        store_in(path.parent).restore(path, shards)
    assert all(torch.equal(shard.local, before[name]) for name, shard in shards.items())  # nothing was read
    text = str(caught.value)
    assert (
        text.startswith(f"{path}: the checkpoint is of another model, optimizer or precision: ") and "remedy: " in text
    )
    return text


def test_another_dtype(saved: Path) -> None:
    half = STATE["policy/model.half"]
    text = refusal(saved, STATE | {"policy/model.half": half._replace(local=half.local.half())})
    assert "for policy/model.half it holds BF16 of shape [16, 8], and the run needs F16 of shape [16, 8]" in text


def test_another_size(saved: Path) -> None:
    text = refusal(saved, STATE | {"policy/model.head": Shard(torch.zeros(20, 8), 0, (20, 8))})
    assert "for policy/model.head it holds F32 of shape [16, 8], and the run needs F32 of shape [20, 8]" in text


def test_another_shape_of_the_same_size(saved: Path) -> None:
    """It would load, with every weight in another place."""
    text = refusal(saved, STATE | {"policy/model.head": Shard(torch.zeros(8, 16), 0, (8, 16))})
    assert "for policy/model.head it holds F32 of shape [16, 8], and the run needs F32 of shape [8, 16]" in text


def test_a_tensor_that_the_checkpoint_lacks(saved: Path) -> None:
    text = refusal(saved, STATE | {"critic/model.value": Shard(torch.zeros(3), 0, (3,))})
    assert "it holds no critic/model.value, and the run needs F32 of shape [3]" in text


def test_tensors_that_the_run_lacks(saved: Path) -> None:
    """A run with fewer layers would go on with half a model."""
    fewer = {name: shard for name, shard in STATE.items() if name != "policy/model.embedding"}
    assert "it holds policy/model.embedding, which the run has not" in refusal(saved, fewer)
    del fewer["policy/model.head"], fewer["policy/mask"]
    assert "it holds policy/model.embedding and 2 more, which the run has not" in refusal(saved, fewer)


def test_one_element_is_one_element(saved: Path) -> None:
    """A step count is a scalar on one backend and a row of one element on another."""
    step = torch.zeros(1)
    store_in(saved.parent).restore(saved, STATE | {"policy/optimizer.step": Shard(step, 0, (1,))})
    assert step.item() == 1


def test_what_was_read_back_is_not_the_file(saved: Path) -> None:
    store = store_in(saved.parent)
    restored = store.restore(saved, blank(STATE))
    assert restored.rank_tensors is not None
    restored.rank_tensors["own"].add_(1)
    manifest, _ = read_manifest(saved)
    assert manifest is not None
    assert all(problem_with(saved / name, record) is None for name, record in manifest.files.items())
    again = store.restore(saved, blank(STATE)).rank_tensors
    assert again is not None and again["own"].item() == 1 and again["empty"].shape == (0,)
