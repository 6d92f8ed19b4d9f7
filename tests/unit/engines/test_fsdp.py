"""What FSDP refuses before any rank is asked; the rest takes ranks: tests/distributed/test_fsdp.py."""

from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.distributed import World
from llmtrain.engines.fsdp import FSDPEngine, FSDPFrozen
from llmtrain.errors import InputError
from llmtrain.models.blueprint import Blueprint
from tests import tiny

TWO = World(0, 2, 0, 2, torch.device("cpu"))
ZAMBA2: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "num_mem_blocks": 1,
    "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
}  # fmt: skip


@pytest.mark.parametrize("kind", [FSDPEngine, FSDPFrozen])
def test_layers_that_share_weights_are_refused(kind: Any) -> None:
    """Each layer would get its own shards of the shared weight, and they would drift apart."""
    with pytest.raises(
        InputError, match="engine.kind: Zamba2ForCausalLM shares weights of .* between layers"
    ) as caught:
        kind(Blueprint(tiny.decoder("zamba2", **ZAMBA2)), tiny.recipe(engine={"kind": "fsdp"}), TWO)
    assert caught.value.remedy == "use ddp or deepspeed"


def test_a_weight_of_a_layer_that_is_used_outside_as_well_is_refused() -> None:
    decoder = tiny.decoder()
    decoder.again = nn.Module()
    decoder.again.weight = decoder.hf.model.layers[1].mlp.up_proj.weight
    with pytest.raises(InputError, match="LlamaForCausalLM shares weights of"):
        FSDPEngine(Blueprint(decoder), tiny.recipe(engine={"kind": "fsdp"}), TWO)


def test_a_parameter_without_dimensions_is_refused() -> None:
    decoder = tiny.decoder()
    decoder.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="a parameter without dimensions, [^ ]+, which has no rows") as caught:
        FSDPEngine(Blueprint(decoder), tiny.recipe(engine={"kind": "fsdp"}), TWO)
    assert caught.value.where == "engine.kind"
