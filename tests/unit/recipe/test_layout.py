"""What cannot run is said by the validation, with what to use instead."""

from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.recipe.layout import check_layout
from llmtrain.recipe.problems import RecipeError
from tests import tiny

FSDP = {"kind": "fsdp"}
ZERO = {"kind": "deepspeed"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"precision": "fp16_mixed", "device": "cpu", "engine": ZERO | {"zero_stage": 2}}, "use bf16_mixed or fp32"),
        ({"precision": "fp16_mixed", "engine": FSDP}, "loss scale.*use bf16_mixed, or engine.kind deepspeed"),
        ({"precision": "bf16_mixed"}, "engine.kind auto does not keep; use bf16_autocast, or"),
        ({"precision": "bf16", "engine": ZERO | {"zero_stage": 3}}, "use bf16_mixed, or engine.kind fsdp or ddp"),
        ({"ema": {"decay": 0.9}, "engine": ZERO | {"zero_stage": 3}}, "zero_stage 3 shards.*use engine.kind fsdp or"),
        ({"precision": "bf16_mixed", "engine": ZERO | {"zero_stage": 0}}, "use stage 1, or bf16_autocast"),
        ({"engine": ZERO | {"zero_stage": 0, "offload_optimizer": "cpu"}}, "needs engine.zero_stage 1 or more"),
        ({"engine": ZERO | {"zero_stage": 2, "offload_optimizer": "nvme"}}, "use cpu, or stage 3"),
        ({"engine": ZERO | {"zero_stage": 2, "offload_parameters": "cpu"}}, "use offload_optimizer, or stage 3"),
        ({"engine": ZERO | {"zero_stage": 3, "offload_optimizer": "nvme"}}, "nvme_path is missing: name a directory"),
        ({"engine": ZERO | {"zero_stage": 1, "zero_plus_plus": {}}}, "zero_plus_plus needs engine.zero_stage 3"),
        ({"engine": ZERO | {"zero_stage": 1, "loss_scale": 8.0}}, "belongs to precision fp16_mixed, not fp32"),
        ({"engine": {"kind": "ddp", "activation_offload": True}}, "needs engine.activation_checkpointing: full or"),
    ],
)
def test_impossible_combinations(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny.recipe(**overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "device", "said"),
    [
        ({"engine": {"kind": "single"}}, 2, None, "engine.kind: engine single is for one process, and there are 2"),
        ({"engine": {"kind": "ddp"}}, 1, None, "engine.kind: engine ddp is for several processes, and there is one"),
        ({"engine": FSDP}, 1, None, "engine.kind: engine fsdp is for several processes.* use single or auto"),
        ({"engine": FSDP | {"shard_size": 3}}, 8, None, "engine.shard_size: 3 does not divide.*use one of 1, 2, 4, 8"),
        ({"engine": FSDP | {"reshard_after_forward": 3}}, 8, None, "engine.reshard_after_forward: 3 does not divide"),
        (
            {"engine": ZERO | {"zero_stage": 3, "zero_plus_plus": {"hpz_partition_size": 3}}},
            4,
            None,
            "hpz_partition_size: 3 does not divide the 4 ranks",
        ),
        (
            {"engine": ZERO | {"zero_stage": 3, "zero_plus_plus": {"quantized_weights": True}}},
            2,
            "cpu",
            "quantized_weights: .*set it to false here",
        ),
        ({"precision": "fp16_mixed", "engine": ZERO | {"zero_stage": 3}}, 2, "cpu", "fp16_mixed has no CPU kernels"),
        (
            {"engine": FSDP | {"activation_checkpointing": "full", "activation_offload": True}},
            2,
            "cpu",
            "engine.activation_offload: .*in host memory already",
        ),
    ],
)
def test_what_the_world_does_not_allow(
    overrides: dict[str, Any], world_size: int, device: str | None, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check_layout(tiny.recipe(**overrides), world_size, device)


@pytest.mark.parametrize(
    "overrides",
    [
        {"engine": FSDP | {"shard_size": 2, "reshard_after_forward": 2, "cpu_offload": True, "prefetch": 2}},
        {"engine": FSDP, "precision": "bf16_mixed", "ema": {"decay": 0.9}},
        {"engine": ZERO | {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/scratch"}},
        {"engine": ZERO | {"zero_stage": 0}},
    ],
)
def test_what_is_possible_passes(overrides: dict[str, Any]) -> None:
    check_layout(tiny.recipe(**overrides), 4, "cpu")
