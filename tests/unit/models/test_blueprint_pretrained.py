"""Pretrained weights that are read a layer at a time are those that transformers loads."""

import json
import logging
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
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtrain.models.blueprint import Blueprint
from llmtrain.models.hub import open_model
from llmtrain.models.saving import save_pretrained
from tests import tiny
from tests.unit.models.blueprints import (
    ARCHITECTURES,
    CONVERTED,
    CPU,
    assert_same,
    is_empty,
    is_real,
    logits,
    made,
)


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
