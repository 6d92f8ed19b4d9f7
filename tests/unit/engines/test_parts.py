"""Optimizer groups, averaged weights, and the state under flat names."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.engines.parts import (
    AveragedWeights,
    build_adamw,
    forward_precision,
    is_matrix,
    prepare_layers,
    set_learning_rate,
    trained_state,
)
from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import AdamW, AutoEngine
from tests import tiny

CPU = torch.device("cpu")


def names_of(decoder: Decoder, parameters: list[nn.Parameter]) -> set[str]:
    by_id = {id(parameter): name for name, parameter in decoder.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


# ----------------------------------------------------------------------------------- optimizer


def test_matrices_decay_and_vectors_do_not() -> None:
    decoder = tiny.decoder(attention_bias=True, tie_word_embeddings=True)
    spec = AdamW(lr=1e-3, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    optimizer = build_adamw(decoder, spec)
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0.0
    for group in optimizer.param_groups:
        assert (group["lr_ratio"], tuple(group["betas"]), group["eps"]) == (1.0, (0.8, 0.9), 1e-6)
    matrices, vectors = names_of(decoder, decayed["params"]), names_of(decoder, kept["params"])
    assert "hf.model.embed_tokens.weight" in matrices
    assert "hf.model.layers.1.self_attn.q_proj.weight" in matrices
    assert "hf.model.layers.1.self_attn.q_proj.bias" in vectors
    assert {"hf.model.norm.weight", "hf.model.layers.0.input_layernorm.weight"} <= vectors
    # each parameter once, the tied head too
    assert len(decayed["params"]) + len(kept["params"]) == len(list(decoder.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    decoder = tiny.decoder()
    decoder.hf.model.embed_tokens.weight.requires_grad_(False)
    groups = build_adamw(decoder, AdamW(lr=1e-3)).param_groups
    chosen = [parameter for group in groups for parameter in group["params"]]
    assert "hf.model.embed_tokens.weight" not in names_of(decoder, chosen)


def test_a_model_of_matrices_only_has_one_group() -> None:
    assert len(build_adamw(nn.Linear(3, 2, bias=False), AdamW(lr=1e-3)).param_groups) == 1


GROUPS = [
    {"names": "*.embed_tokens.*", "lr_ratio": 0.1},
    {"names": "*norm*", "lr_ratio": 2.0, "weight_decay": 0.05},
    {"names": "model.*_proj.weight", "lr_ratio": 0.1},
]


def with_groups(*groups: dict[str, object]) -> AdamW:
    return AdamW.model_validate({"kind": "adamw", "lr": 1e-3, "weight_decay": 0.3, "groups": list(groups)})


def test_the_first_group_that_matches_counts_by_names_as_users_see_them() -> None:
    optimizer = build_adamw(decoder := tiny.decoder(), with_groups(*GROUPS))
    settings = {}
    for group in optimizer.param_groups:
        for name in names_of(decoder, group["params"]):
            settings[name] = (group["lr_ratio"], group["weight_decay"])
    assert len(settings) == len(list(decoder.parameters()))
    assert settings["hf.model.embed_tokens.weight"] == (0.1, 0.3)
    assert settings["hf.model.norm.weight"] == (2.0, 0.05)  # vectors, too, since the group says so
    assert settings["hf.model.layers.1.mlp.up_proj.weight"] == (0.1, 0.3)
    assert settings["hf.lm_head.weight"] == (1.0, 0.3)
    assert len(optimizer.param_groups) == 3  # what has the same settings is together
    set_learning_rate(optimizer, 5.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 10.0, 5.0}


@pytest.mark.parametrize("groups", [[{"names": "*lora_B*", "lr_ratio": 16}], [GROUPS[0], GROUPS[0]]])
def test_a_group_without_parameters_is_an_error(groups: list[dict[str, object]]) -> None:
    with pytest.raises(InputError, match="no trained parameter is called") as caught:
        build_adamw(tiny.decoder(), with_groups(*groups))
    assert caught.value.where == f"optimizer.groups.{len(groups) - 1}.names"
    assert "names are such as model.embed_tokens.weight" in str(caught.value.remedy)


@pytest.mark.parametrize(("shape", "expected"), [((3, 2), True), ((1, 4), False), ((4, 1), False), ((4,), False)])
def test_a_row_or_a_column_is_no_matrix(shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(shape) is expected


# ------------------------------------------------------------------------------------- average


def averaged_steps(decay: float, num_steps: int, dtype: torch.dtype) -> tuple[AveragedWeights, Tensor]:
    """The average after some steps of a random walk, and the same by the recurrence written out."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, generator=generator).to(dtype))
    averaged = AveragedWeights({"w": parameter}, decay)
    expected = parameter.detach().double()
    for n in range(1, num_steps + 1):
        with torch.no_grad():
            parameter += torch.randn(5, generator=generator).to(dtype)
        averaged.update()
        keep = min(decay, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * parameter.detach().double()
    return averaged, expected


@pytest.mark.parametrize("decay", [0.25, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_its_recurrence(decay: float, dtype: torch.dtype) -> None:
    averaged, expected = averaged_steps(decay, 40, dtype)
    assert averaged.averages["w"].dtype == torch.float32  # in bf16 a small step would be rounded away
    torch.testing.assert_close(averaged.averages["w"], expected.float(), rtol=1e-5, atol=1e-6)
    assert averaged.num_updates == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_gives_the_own_weights_back_bit_for_bit(dtype: torch.dtype) -> None:
    averaged, _ = averaged_steps(0.9, 3, dtype)
    parameter = averaged.weights["w"]
    own, average = parameter.detach().clone(), averaged.averages["w"].clone()
    assert not torch.equal(own, average.to(dtype))
    with averaged.swapped_in():
        assert torch.equal(parameter, average.to(dtype))
    assert torch.equal(parameter, own)
    with pytest.raises(KeyboardInterrupt), averaged.swapped_in():
        raise KeyboardInterrupt
    assert torch.equal(parameter, own)
    assert torch.equal(averaged.averages["w"], average)


# --------------------------------------------------------------------------------------- state


def test_the_state_has_flat_names_and_is_live() -> None:
    decoder = tiny.decoder(tie_word_embeddings=True)
    frozen = "hf.model.layers.1.mlp.up_proj.weight"
    decoder.get_parameter(frozen).requires_grad_(False)
    optimizer = build_adamw(decoder, AdamW(lr=1e-2))
    set_learning_rate(optimizer, 1e-2)
    state = dict(trained_state(decoder, optimizer))
    name = "hf.model.layers.0.mlp.up_proj.weight"
    assert {key for key in state if name in key} == {
        f"model.{name}",
        *(f"optimizer.{name}.{moment}" for moment in ("exp_avg", "exp_avg_sq", "step")),
    }
    assert not [key for key in state if frozen in key]  # those are the recipe's model's
    assert "model.hf.lm_head.weight" not in state  # tied: once
    before = {key: tensor.clone() for key, tensor in state.items()}
    ids = torch.arange(12)[None]
    decoder.hf(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(state[key], before[key]) for key in state)
    assert state[f"optimizer.{name}.step"] == 1


def test_the_first_step_is_that_of_an_optimizer_whose_state_comes_later() -> None:
    ids = torch.arange(12)[None]
    models = []
    for early in (True, False):
        decoder = tiny.decoder()
        optimizer = build_adamw(decoder, AdamW(lr=1e-2))
        set_learning_rate(optimizer, 1e-2)
        if not early:
            optimizer.state.clear()
        for _ in range(3):
            decoder.hf(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(decoder.state_dict())
    for name in models[0]:
        assert torch.equal(models[0][name], models[1][name]), name


# ------------------------------------------------------------------------- precision and layers


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", False), ("bf16", False), ("bf16_autocast", True)])
def test_only_autocast_casts(precision: str, autocast: bool) -> None:
    with forward_precision(precision, CPU):
        assert torch.is_autocast_enabled("cpu") is autocast
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == (torch.bfloat16 if autocast else torch.float32)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("how", ["full", "selective"])
def test_activation_checkpointing_reaches_every_layer_and_changes_no_gradient(how: str) -> None:
    ids = torch.arange(12)[None]
    gradients = []
    for option in ("none", how):
        decoder = tiny.decoder()
        prepare_layers(decoder, AutoEngine(activation_checkpointing=option))
        assert all(layer.gradient_checkpointing is (option != "none") for layer in decoder.layers())
        decoder.train()
        decoder.hf(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_selective_checkpointing_computes_no_matrix_product_again() -> None:
    def products(option: str) -> int:
        decoder = tiny.decoder().train()
        prepare_layers(decoder, AutoEngine(activation_checkpointing=option))
        with FlopCounterMode(display=False) as counter:
            decoder(torch.arange(12)[None], None, lambda hidden, head: hidden.sum()).backward()
        return counter.get_total_flops()

    assert products("selective") == products("none") < products("full")


def test_activation_checkpointing_where_there_is_none() -> None:
    ctrl = tiny.decoder("ctrl", n_embd=32, n_layer=1, n_head=4, dff=32)
    with pytest.raises(InputError, match=r"engine.activation_checkpointing: CTRLLMHeadModel has no.*") as caught:
        prepare_layers(ctrl, AutoEngine(activation_checkpointing="full"))
    assert caught.value.remedy == "set it to none"


def test_compilation_is_by_layer() -> None:
    """Compiling itself takes too long here; asked is each layer, and nothing around it."""
    decoder = tiny.decoder()
    prepare_layers(decoder, AutoEngine(compile=True))
    compiled = {name for name, module in decoder.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"hf.model.layers.0", "hf.model.layers.1"}
