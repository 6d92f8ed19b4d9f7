"""What a run saves beside its shards, and how it goes on from it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llmtrain.checkpoint.generators import seed_generators
from llmtrain.checkpoint.state import restore_state, save_state
from llmtrain.contracts import Algorithm, Engine, Shard
from llmtrain.distributed import World
from llmtrain.errors import InputError
from llmtrain.progress import Progress
from llmtrain.recipe.schema import Recipe
from tests import tiny
from tests.unit.checkpoint.states import ALONE, store_in, whole


@dataclass
class Held:
    """A state without a model; an algorithm that counts."""

    tensors: dict[str, torch.Tensor]
    counted: int = 0
    loaded: list[str] = field(default_factory=list)

    def state(self) -> dict[str, Shard]:
        return whole(self.tensors)

    def state_loaded(self) -> None:
        self.loaded.append("derived from what was read")

    def describe(self) -> str:
        return "held by hand"

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counted = state["counted"]


RECIPE = tiny.recipe(seed=17)


def _saved(directory: Path) -> tuple[Path, Held, Held]:
    policy, critic = Held({"model.w": torch.arange(6.0)}, counted=5), Held({"model.w": torch.full((3,), 7.0)})
    engines = cast(Mapping[str, Engine], {"policy": policy, "critic": critic})
    with store_in(directory) as store:
        progress = Progress(step=4, tokens=400, skipped=2, skipped_in_a_row=1)
        save_state(store, progress, engines, cast(Algorithm, policy), {"loss": float("nan"), "accuracy": 0.5}, RECIPE)
    return directory / "step-00000004", policy, critic


def _restored(path: Path, world: World, recipe: Recipe = RECIPE) -> tuple[Progress, Held, Held]:
    policy, critic = Held({"model.w": torch.zeros(6)}), Held({"model.w": torch.zeros(3)})
    engines = cast(Mapping[str, Engine], {"policy": policy, "critic": critic})
    store = store_in(path.parent, world)
    return restore_state(store, path, engines, cast(Algorithm, policy), recipe, world), policy, critic


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    seed_generators(1, 0)
    path, policy, critic = _saved(tmp_path)
    drawn = torch.randn(3).tolist(), random.random()
    progress, *engines = _restored(path, ALONE)
    assert progress == Progress(step=4, tokens=400, skipped=2, skipped_in_a_row=1)
    for engine, before in zip(engines, (policy, critic), strict=True):
        assert torch.equal(engine.tensors["model.w"], before.tensors["model.w"]) and len(engine.loaded) == 1
    assert engines[0].counted == 5
    assert (torch.randn(3).tolist(), random.random()) == drawn
    assert store_in(tmp_path).newest() == path


def test_on_another_number_of_ranks_generators_are_new_and_the_same_at_every_try(tmp_path: Path) -> None:
    seed_generators(1, 0)
    path, *_ = _saved(tmp_path)
    drawn = torch.randn(3).tolist()
    draws = []
    for rank in (0, 0, 1):
        _restored(path, World(rank, 2, rank, 2, ALONE.device))
        draws.append(torch.randn(3).tolist())
    assert draws[0] == draws[1] and draws[0] != draws[2] and drawn not in draws


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path, _, _ = _saved(tmp_path)
    with pytest.raises(InputError, match="the checkpoint is of another run: name was 'tiny', is 'other'; seed was 17"):
        _restored(path, tiny.ALONE, tiny.recipe(name="other", seed=18))
    _restored(path, tiny.ALONE, tiny.recipe(seed=17, output_dir="elsewhere", engine={"kind": "ddp"}))
