"""Weights that come a layer at a time are those of a model that is built whole."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from llmtrain.errors import TrainingError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.models.hub import open_model
from llmtrain.models.saving import save_pretrained
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]
HEAD = {"head_dim": 8}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1}
NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": tiny.LLAMA,
    "qwen3": tiny.LLAMA | HEAD,
    "mistral": tiny.LLAMA,
    "olmo2": tiny.LLAMA,
    "gemma2": tiny.LLAMA | HEAD,  # norms begin at zero
    "gemma3_text": tiny.LLAMA | HEAD,  # several rotary tables, a scaled embedding
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # tied; a parent initialises its child again
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": NEOX,
    "mamba2": MAMBA,  # scales in place what it drew
    "mixtral": tiny.LLAMA | {"num_local_experts": 4},
}
# Their files have other names or pieces than the model: a head by its old name, each expert apart.
CONVERTED = ("gpt_neox", "mixtral")
# Why they are built whole: the backbone writes into its layers; layers share weights; values of the constructor.
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "falcon_h1": (
        tiny.LLAMA | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
        "mup_vector has a value that only the model's constructor knows",
    ),
    "zamba2": (
        {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 64, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8,
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        "is shared by several layers",
    ),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "has a value that only the model's constructor knows"),
}  # fmt: skip


def from_config(architecture: str = "llama", fields: dict[str, Any] | None = None, **overrides: Any) -> Blueprint:
    shape = ARCHITECTURES[architecture] if fields is None else fields
    model = {"kind": "config", "architecture": architecture, "config": shape}
    return open_model(tiny.recipe(model=model, **overrides), tiny.tokenizer())


def made(blueprint: Blueprint) -> PreTrainedModel:
    blueprint.materialise(blueprint.decoder, CPU)
    return blueprint.decoder.hf


def built_whole(blueprint: Blueprint, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    hf = blueprint.decoder.hf
    return AutoModelForCausalLM.from_config(hf.config, dtype=hf.dtype)


def is_empty(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters()) and all(b.is_meta for b in module.buffers())


def is_real(module: nn.Module) -> bool:
    return not any(p.is_meta for p in module.parameters()) and not any(b.is_meta for b in module.buffers())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Parameters and all buffers, bit for bit."""
    for left, right in ((a.named_parameters(), b.named_parameters()), (a.named_buffers(), b.named_buffers())):
        mine, theirs = dict(left), dict(right)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Tensor = model.eval()(input_ids=IDS).logits
    return output


# ------------------------------------------------------------------------------ random weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_a_layer_at_a_time_and_are_those_of_the_whole(architecture: str) -> None:
    parts, whole = from_config(architecture), from_config(architecture)
    state = torch.get_rng_state()
    layers = parts.layers
    assert is_empty(parts.decoder) and len(layers) == 2
    # in another order, since no unit depends on another
    parts.materialise(layers[1], CPU)
    assert is_real(layers[1]) and is_empty(layers[0])
    parts.materialise(layers[0], CPU)
    assert parts.decoder.hf.get_input_embeddings().weight.is_meta
    assert_same(made(parts), made(whole))
    assert is_real(parts.decoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert logits(parts.decoder.hf).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_those_that_transformers_gives(architecture: str) -> None:
    """Buffers (rotary tables, masks) bit for bit; parameters by their mean and spread."""
    blueprint = from_config(architecture)
    model, reference = made(blueprint), built_whole(blueprint)
    tables = dict(model.named_buffers())
    assert tables.keys() == dict(reference.named_buffers()).keys()
    for name, buffer in reference.named_buffers():
        assert torch.equal(tables[name], buffer), name
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        other = expected[name]
        assert (p.shape, p.dtype, p.requires_grad) == (other.shape, other.dtype, other.requires_grad), name
        spread = max(p.std().item(), other.std().item())
        error = spread / math.sqrt(p.numel())  # of the mean; of the spread it is less
        assert abs(p.mean().item() - other.mean().item()) <= 6 * error + 1e-7, name
        assert abs(p.std().item() - other.std().item()) <= 6 * error + 1e-7, name
    pad = model.config.pad_token_id
    assert (model.get_input_embeddings().weight[pad] == 0).all() == (
        reference.get_input_embeddings().weight[pad] == 0
    ).all()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_tables(rope: dict[str, Any]) -> None:
    for precision in ("fp32", "bf16"):
        blueprint = from_config(fields=tiny.LLAMA | {"rope_parameters": rope}, precision=precision)
        assert is_empty(blueprint.decoder)
        table, expected = made(blueprint).model.rotary_emb, built_whole(blueprint).model.rotary_emb
        assert torch.equal(table.inv_freq, expected.inv_freq) and table.inv_freq.dtype == torch.float32
        assert torch.equal(table.original_inv_freq, expected.original_inv_freq)
        assert table.attention_scaling == expected.attention_scaling


def test_the_seed_decides() -> None:
    first, same, other = (made(from_config(seed=seed)) for seed in (3, 3, 4))
    assert_same(first, same)
    a, b = first.model.layers[0].mlp, first.model.layers[1].mlp
    assert not torch.equal(a.up_proj.weight, b.up_proj.weight)
    assert not torch.equal(a.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_weights_of_bf16() -> None:
    model = made(from_config(precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights_stay_one() -> None:
    blueprint = from_config(fields=tiny.LLAMA | {"tie_word_embeddings": True})
    num_parameters = blueprint.decoder.num_parameters()
    model = made(blueprint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert blueprint.decoder.num_parameters() == num_parameters
    assert is_real(blueprint.decoder)


def test_what_is_frozen_stays_so_and_marks_on_tensors_are_kept() -> None:
    blueprint = from_config()
    weight = blueprint.decoder.hf.get_input_embeddings().weight.requires_grad_(False)
    weight.mark = "seen"
    made(blueprint)
    parameters = dict(blueprint.decoder.named_parameters())
    assert [name for name, p in parameters.items() if not p.requires_grad] == ["hf.model.embed_tokens.weight"]
    assert [vars(p) for p in parameters.values() if vars(p)] == [{"mark": "seen"}]


def test_only_layers_and_the_whole_are_materialised() -> None:
    blueprint = from_config()
    with pytest.raises(AssertionError, match="by its layers, or whole"):
        blueprint.materialise(blueprint.decoder.hf.model.norm, CPU)


def test_a_real_decoder_is_only_moved() -> None:
    decoder = tiny.decoder()
    before = {name: (p, p.clone()) for name, p in decoder.named_parameters()}
    blueprint = Blueprint(decoder, seed=9)
    blueprint.materialise(blueprint.layers[0], CPU)
    blueprint.materialise(decoder, CPU)
    for name, p in decoder.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]), name


# -------------------------------------------------------------- what cannot be made in parts


@pytest.mark.parametrize("architecture", WHOLE)
def test_others_are_built_whole(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, reason = WHOLE[architecture]
    with caplog.at_level(logging.INFO):
        blueprint = from_config(architecture, fields, seed=3)
    assert is_real(blueprint.decoder)
    assert "builds the whole model" in caplog.text and reason in caplog.text
    model = made(blueprint)
    assert_same(model, built_whole(blueprint, seed=3))
    assert logits(model).isfinite().all()


class _Scaled(nn.Module):
    """A norm with what transformers' initialisation does not know."""

    def __init__(self, kind: str):
        super().__init__()
        if kind == "parameter":
            self.gain = nn.Parameter(torch.full((3,), 2.0))
        elif kind == "buffer":
            self.register_buffer("steps", torch.ones(3, dtype=torch.int64))
        elif kind == "attribute":
            self.tables = [torch.ones(3)]


def llama_on_meta(change: Callable[[PreTrainedModel], None]) -> Blueprint:
    config = AutoConfig.for_model("llama", vocab_size=tiny.VOCABULARY, **tiny.LLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        change(model)
    return Blueprint(Decoder(model))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("parameter", "hf.model.layers.1.scaled.gain has a value that only the model's constructor knows"),
        ("buffer", "hf.model.layers.1.scaled.steps has a value that only the model's constructor knows"),
        ("attribute", "hf.model.layers.1.scaled keeps a tensor that is neither a parameter nor a buffer"),
    ],
)
def test_values_that_only_the_constructor_knows_are_seen(kind: str, reason: str) -> None:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].scaled = _Scaled(kind)

    assert llama_on_meta(change).obstacle() == reason
    assert llama_on_meta(lambda model: None).obstacle() is None


@pytest.mark.parametrize(
    "kind", ["scaled in place", "copied from the constructor's", "of another layer", "an operation"]
)
def test_an_initialisation_that_needs_values_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaForCausalLM._init_weights

    def initialise(self: PreTrainedModel, module: nn.Module) -> None:
        if kind == "scaled in place" and isinstance(module, LlamaRMSNorm):
            module.weight.mul_(2)
            return
        if kind == "copied from the constructor's" and isinstance(module, LlamaDecoderLayer):
            module.post_attention_layernorm.weight.copy_(module.mystery * 1)
        if kind == "of another layer" and isinstance(module, LlamaForCausalLM):
            module.model.layers[0].mlp.up_proj.weight.data.zero_()
        if kind == "an operation" and isinstance(module, LlamaMLP):
            module.up_proj.weight.sum().item()
        original(self, module)

    # each transformers model within the model has an _init_weights
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaPreTrainedModel._init_weights", initialise)

    def change(model: PreTrainedModel) -> None:
        if kind == "copied from the constructor's":
            model.model.layers[0].mystery = nn.Parameter(torch.ones(32))

    blueprint = llama_on_meta(change)
    assert blueprint.obstacle() is not None
    if kind in ("scaled in place", "copied from the constructor's"):
        with pytest.raises(TrainingError, match="weights without a value"):
            made(blueprint)


def test_a_constructor_that_wants_values(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original = LlamaMLP.__init__

    def construct(self: nn.Module, config: Any) -> None:
        original(self, config)  # type: ignore[arg-type]
        assert torch.ones(3).sum().item() == 3

    monkeypatch.setattr(LlamaMLP, "__init__", construct)
    with caplog.at_level(logging.INFO):
        assert is_real(from_config().decoder)
    assert "its constructor wants values" in caplog.text


# ------------------------------------------------------------------------- pretrained weights


def saved(directory: Path, architecture: str = "llama", **fields: Any) -> PreTrainedModel:
    """A model in `directory`; untied, and with a generation config of its own."""
    model = tiny.decoder(architecture, **(ARCHITECTURES[architecture] | {"max_position_embeddings": 32} | fields)).hf
    model.generation_config.max_length = 77
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), directory)
    return model


def pretrained(path: Path, **overrides: Any) -> Blueprint:
    recipe = tiny.recipe(model={"kind": "pretrained", "path": str(path)}, **overrides)
    return open_model(recipe, tiny.tokenizer())


def damage(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in CONVERTED])
def test_pretrained_weights_come_a_layer_at_a_time(architecture: str, precision: str, tmp_path: Path) -> None:
    saved(tmp_path, architecture)
    engine = {"engine": {"kind": "fsdp"}} if precision == "bf16_mixed" else {}
    blueprint = pretrained(tmp_path, precision=precision, **engine)
    assert is_empty(blueprint.decoder)
    blueprint.materialise(blueprint.layers[1], CPU)
    assert is_real(blueprint.layers[1]) and is_empty(blueprint.layers[0])
    model = made(blueprint)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same(model, reference)
    assert torch.equal(logits(model), logits(reference))
    assert model.generation_config.max_length == 77
    assert model.config.dtype == dtype


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = saved(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    blueprint = pretrained(tmp_path / "many")
    assert is_empty(blueprint.decoder)
    assert_same(made(blueprint), model)


FROM_THE_HUB = """
import torch
from llmtrain.models.hub import open_model
from tests import tiny
blueprint = open_model(tiny.recipe(model={"kind": "pretrained", "path": "some/model"}), tiny.tokenizer())
assert all(p.is_meta for p in blueprint.decoder.parameters())
blueprint.materialise(blueprint.decoder, torch.device("cpu"))
print(blueprint.decoder.hf.lm_head.weight.double().sum().item())
"""


def test_a_hub_model_that_is_cached_needs_no_network(tmp_path: Path) -> None:
    """As on the compute nodes of most clusters; the cache is laid out as huggingface_hub does."""
    cached = tmp_path / "hub" / "models--some--model"
    model = saved(cached / "snapshots" / ("a" * 40))
    (cached / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    model.save_pretrained(cached / "snapshots" / ("a" * 40), max_shard_size="20KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == model.lm_head.weight.double().sum().item()


def test_weights_are_cast_as_they_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path / "one")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    blueprint = pretrained(tmp_path / "half")
    assert is_empty(blueprint.decoder)
    assert_same(made(blueprint), AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32))


def test_a_tied_head_may_be_in_the_files_or_not(tmp_path: Path) -> None:
    model = saved(tmp_path / "one", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")
    for name, change in (
        ("both", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})),
        ("head", lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})),
    ):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        damage(tmp_path / name, change)
    for name in ("one", "both", "head"):
        blueprint = pretrained(tmp_path / name)
        assert is_empty(blueprint.decoder)
        assert_same(made(blueprint), model)
        assert blueprint.decoder.hf.lm_head.weight is blueprint.decoder.hf.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 32)}),
            "lm_head.weight are tied in the model and differ in the files",
        ),
        (lambda tensors: tensors.update({"model.extra": torch.ones(3)}), "the model has no model.extra"),
        (
            lambda tensors: tensors.update({name.removeprefix("model."): tensors.pop(name) for name in list(tensors)}),
            "model.embed_tokens.weight is not in the files",
        ),
    ],
    ids=["a head that is not tied", "a tensor too many", "names of the backbone"],
)
def test_files_that_are_not_the_models_own_go_through_transformers(
    change: Callable[[dict[str, Tensor]], object], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    damage(tmp_path, change)
    with caplog.at_level(logging.INFO):
        blueprint = pretrained(tmp_path)
    assert is_real(blueprint.decoder) and reason in caplog.text
    assert_same(made(blueprint), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("architecture", CONVERTED)
def test_files_that_transformers_converts_go_through_it(architecture: str, tmp_path: Path) -> None:
    model = saved(tmp_path, architecture)
    assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()
    blueprint = pretrained(tmp_path)
    assert is_real(blueprint.decoder)
    assert_same(made(blueprint), model)


def test_rotary_tables_in_old_files_are_passed_over(tmp_path: Path) -> None:
    model = saved(tmp_path)
    damage(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    blueprint = pretrained(tmp_path)
    assert is_empty(blueprint.decoder)
    assert_same(made(blueprint), model)


def test_a_scaled_rope_of_a_pretrained_model(tmp_path: Path) -> None:
    saved(tmp_path)
    rope = {"rope_type": "yarn", "factor": 4.0}
    recipe = tiny.recipe(model={"kind": "pretrained", "path": str(tmp_path), "rope_parameters": rope})
    blueprint = open_model(recipe, tiny.tokenizer())
    assert is_empty(blueprint.decoder)
    model = made(blueprint)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config, dtype=torch.float32)
    assert_same(model, reference)


def test_an_export_keeps_the_names_and_the_generation_config(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    model = made(pretrained(tmp_path / "one"))
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text())["max_length"] == 77
