"""What adapters must do under FSDP: checks of test_fsdp.py."""

from typing import Any, NamedTuple

import pytest
import torch

from llmtrain.distributed import World, barrier
from llmtrain.engines.fsdp import FSDPEngine
from llmtrain.errors import InputError
from llmtrain.models.peft import Adapter
from tests import adapters
from tests.distributed.fsdp_case import (
    ADAMW,
    CPU,
    DIRECTORY,
    ENGINE,
    LR,
    Truth,
    assert_near,
    batches,
    step,
)

ADAPTERS = ("lora", "lora, dora", "lora, pissa", "lora, whole embeddings", "MISS", "prompt_tuning", "prefix_tuning")


class Tuned(NamedTuple):
    engine: FSDPEngine
    adapter: Adapter
    truth: Truth


def tuned(world: World, adapter: dict[str, Any], **overrides: Any) -> Tuned:
    """An adapter on the tiny pretrained model, put in before any weight is there; and in one process."""
    base = DIRECTORY[0] / "base"
    if world.is_main and not base.exists():
        adapters.pretrained(base, vocab_size=97)
    barrier()
    optimizer = ADAMW | overrides.pop("optimizer", {})
    asked = adapters.recipe(base, adapter, engine=ENGINE, optimizer=optimizer, **overrides)
    plan, made = adapters.adapted(asked)
    whole_plan, _ = adapters.adapted(asked.model_copy(update={"precision": "fp32"}))
    whole_plan.materialise(whole_plan.decoder, CPU)
    return Tuned(FSDPEngine(plan, asked, world), made, Truth(whole_plan.decoder))


def adapters_train_over_a_frozen_base(world: World) -> None:
    for kind in ADAPTERS:
        engine, adapter, truth = tuned(world, adapters.KINDS[kind])
        assert_near(engine, truth.model, relative=0)
        before = {name: tensor.clone() for name, tensor in engine.full_parameters()}
        for _, (ids, targets) in zip(range(4), batches(), strict=False):
            norm, _ = step(engine, ids, targets, world)
            assert norm == pytest.approx(truth.step(ids, targets), rel=1e-5), kind
        assert_near(engine, truth.model)
        trained = {name for name, p in truth.model.named_parameters() if p.requires_grad}
        for name, tensor in engine.full_parameters():
            assert torch.equal(tensor, before[name]) is (name not in trained), name
        # The base is the recipe's, and in no checkpoint; and an export gathers nothing of it.
        assert {name for name in engine.state() if name.startswith("model.")} <= {f"model.{name}" for name in trained}
        assert trained <= {name for name, _ in engine.full_parameters(adapter.names)} == adapter.names


def frozen_weights_are_kept_as_they_are_computed_with(world: World) -> None:
    engine, _, truth = tuned(world, adapters.LORA, precision="bf16_mixed")
    for parameter in engine.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    for _, (ids, targets) in zip(range(2), batches(), strict=False):
        norm, applied = step(engine, ids, targets, world)
        assert applied and norm == pytest.approx(truth.step(ids, targets), rel=3e-2)


def learning_rates_of_groups(world: World) -> None:
    groups = [{"names": "*lora_B*", "lr_ratio": 4.0}, {"names": "*down_proj*", "lr_ratio": 0.0}]
    engine, _, truth = tuned(world, adapters.LORA, optimizer={"groups": groups})
    truth.optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": LR * (4.0 if "lora_B" in name else 0.0 if "down_proj" in name else 1.0)}
            for name, p in truth.model.named_parameters()
            if p.requires_grad
        ],
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
        foreach=False,
    )
    for _, (ids, targets) in zip(range(4), batches(), strict=False):
        step(engine, ids, targets, world)
        truth.step(ids, targets)
    assert_near(engine, truth.model)


def layers_that_share_weights_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="shares weights of .* between layers"):
        tuned(world, adapters.KINDS["VBLORA"])
