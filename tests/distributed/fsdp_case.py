"""What the checks of FSDP share: recipes and models, the same training in one process, and comparing the two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.distributed import World
from llmtrain.engines.fsdp import FSDPEngine, FSDPFrozen
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.models.hub import open_model
from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy
from llmtrain.recipe.schema import Recipe
from tests import tiny

ADAMW = {"kind": "adamw", "lr": 1.0, "eps": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 0.5}
ENGINE = {"kind": "fsdp", "timeout_seconds": 60}
LR, ROWS, MICRO = 2e-3, 12, 3
# 97 rows do not divide by the ranks, and of vectors of six numbers the last of four ranks has none.
QWEN3 = tiny.LLAMA | {"vocab_size": 97, "head_dim": 6}
CPU = torch.device("cpu")
DIRECTORY: list[Path] = []  # of this process's results


def recipe(*, architecture: str = "llama", fields: dict[str, Any] | None = None, **overrides: Any) -> Recipe:
    engine = ENGINE | overrides.pop("engine", {})
    shape = (tiny.LLAMA if fields is None else fields) | {"vocab_size": 97}
    model = {"kind": "config", "architecture": architecture, "config": shape}
    optimizer = ADAMW | overrides.pop("optimizer", {})
    return tiny.recipe(model=model, engine=engine, optimizer=optimizer, **overrides)


def blueprint(asked: Recipe) -> Blueprint:
    return open_model(asked, tiny.tokenizer())


def whole(asked: Recipe) -> Decoder:
    made = blueprint(asked)
    made.materialise(made.decoder, CPU)
    return made.decoder


def batches(seed: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets), each [ROWS, T]; ragged: of some rows most targets do not count, of some none."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 96, (ROWS, 10), generator=generator)
        targets = torch.randint(3, 96, (ROWS, 10), generator=generator)
        counted = torch.rand(ROWS, 10, generator=generator) < torch.rand(ROWS, 1, generator=generator)
        counted[1] = False
        yield ids, targets.where(counted, IGNORE_INDEX)


def loss_sum(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    def nll(hidden: Tensor, head: nn.Linear) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten())

    loss: Tensor = model(ids, None, nll)
    return loss


def num_counted(targets: Tensor) -> int:
    return int((targets != IGNORE_INDEX).sum())


def step(engine: FSDPEngine, ids: Tensor, targets: Tensor, world: World, scale: float = 1.0) -> tuple[float, bool]:
    """One optimizer step on this rank's rows, in MICRO micro-batches."""
    own = [rows.chunk(MICRO) for rows in (ids[world.rank :: world.size], targets[world.rank :: world.size])]
    for number, (some_ids, some_targets) in enumerate(zip(*own, strict=True)):
        with engine.accumulate(last=number == len(own[0]) - 1):
            engine.backward(scale * loss_sum(engine.model, some_ids, some_targets) / num_counted(targets))
    result = engine.step(LR)
    return result.grad_norm, result.applied


class Truth:
    """The same steps by torch's own pieces, on the whole batch at once."""

    def __init__(self, decoder: Decoder, clip_norm: float | None = 0.5):
        self.model, self.clip_norm = decoder.train(), clip_norm
        self.parameters = [p for p in decoder.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if min(p.shape) > 1 < p.ndim], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if not min(p.shape) > 1 < p.ndim], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95), eps=1e-5, foreach=False
        )

    def step(self, ids: Tensor, targets: Tensor) -> float:
        self.optimizer.zero_grad()
        (loss_sum(self.model, ids, targets) / num_counted(targets)).backward()
        largest = float("inf") if self.clip_norm is None else self.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, largest)
        self.optimizer.step()
        return norm.item()


def assert_near(engine: FSDPEngine | FSDPFrozen, truth: nn.Module, relative: float = 1e-6) -> None:
    expected = truth.state_dict()
    given = {name: tensor.clone() for name, tensor in engine.full_parameters()}
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        difference = (tensor - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert difference <= relative, f"{name}: {difference:.2e}"


def compare(asked: Recipe, world: World, steps: int = 4, relative: float = 1e-6) -> FSDPEngine:
    """Trains as asked and in one process, and returns the engine."""
    engine, truth = FSDPEngine(blueprint(asked), asked, world), Truth(whole(asked), asked.optimizer.clip_norm)
    assert_near(engine, truth.model, relative=0)  # they begin alike, bit for bit
    for _, (ids, targets) in zip(range(steps), batches(), strict=False):
        norm, applied = step(engine, ids, targets, world)
        expected = truth.step(ids, targets)
        assert applied
        allowed = 1e-5 if relative <= 1e-5 else 3e-2
        assert abs(norm - expected) <= allowed * expected, f"gradient norm {norm} and not {expected}"
    assert_near(engine, truth.model, relative)
    return engine


def saved(engine: FSDPEngine) -> dict[str, Tensor]:
    return {name: run.local.clone() for name, run in engine.state().items()}


def assert_same_state(engine: FSDPEngine, expected: dict[str, Tensor]) -> None:
    given = saved(engine)
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert torch.equal(tensor, expected[name]), name


@torch.no_grad()
def logits(decoder: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = decoder(ids, None, lambda hidden, head: head(hidden))
    return result
