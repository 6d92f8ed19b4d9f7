"""Models that score, opened for training: from a config, from files of language models and of models that score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from llmtrain.errors import InputError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.checks import Asked, check_causality, check_document_isolation, check_head
from llmtrain.models.decoder import Decoder
from llmtrain.models.hub import open_model, open_other_model
from llmtrain.models.saving import save_pretrained
from llmtrain.recipe.schema import ModelFromConfig, ModelFromPretrained
from tests import adapters, scorers, tiny
from tests.unit.models.test_hub_gguf import write_gguf

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]
ALGORITHMS = {"outcome": {"kind": "reward_model"}, "process": {"kind": "process_reward"}}
AUTO = {"outcome": AutoModelForSequenceClassification, "process": AutoModelForTokenClassification}
OUTPUTS = {"outcome": 1, "process": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
QWEN3 = tiny.LLAMA | {"head_dim": 8}


def opened(kind: str, model: dict[str, Any], **overrides: Any) -> Blueprint:
    recipe = tiny.recipe(model=model, algorithm=ALGORITHMS.get(kind, {"kind": kind}), **overrides)
    return open_model(recipe, tiny.tokenizer())


def built(kind: str, model: dict[str, Any], **overrides: Any) -> Decoder:
    blueprint = opened(kind, model, **overrides)
    blueprint.materialise(blueprint.decoder, CPU)
    decoder: Decoder = blueprint.decoder.eval()
    return decoder


def pretrained(path: Path) -> dict[str, Any]:
    return {"kind": "pretrained", "path": str(path)}


@torch.no_grad()
def scores(decoder: Decoder) -> Tensor:
    result: Tensor = decoder(IDS, None, lambda hidden, head: head(hidden))
    return result


def refused(make: Callable[[], object], message: str) -> InputError:
    with pytest.raises(InputError, match=message) as caught:
        make()
    return caught.value


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize(("architecture", "shape"), [("llama", tiny.LLAMA), ("qwen3", QWEN3), ("gpt2", GPT2)])
def test_from_a_config(kind: str, architecture: str, shape: dict[str, Any]) -> None:
    model = {"kind": "config", "architecture": architecture, "config": shape}
    blueprint = opened(kind, model)
    assert blueprint.is_empty  # unit by unit, as others
    decoder = built(kind, model)
    asked = Asked(decoder, decoder, CPU, exact=True)
    check_head(asked)
    check_causality(asked)
    if architecture != "gpt2":
        check_document_isolation(asked, num_rows=2)
    head = decoder.head
    assert head.weight.shape == (OUTPUTS[kind], 32)
    assert 0 < head.weight.std() < 0.05  # transformers' own initialisation
    assert torch.equal(head.weight, built(kind, model).head.weight)
    assert not torch.equal(head.weight, built(kind, model, seed=1).head.weight)
    config = decoder.hf.config
    assert (config.num_labels, config.pad_token_id) == (OUTPUTS[kind], 2)
    assert kind == "outcome" or config.id2label == {0: "wrong", 1: "right"}
    embedding = decoder.hf.get_input_embeddings().weight
    assert decoder.num_matmul_parameters() == decoder.num_parameters() - embedding.numel()


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_gets_a_new_head(kind: str, tied: bool, tmp_path: Path) -> None:
    base = adapters.pretrained(tmp_path / "base", tie_word_embeddings=tied)
    blueprint = opened(kind, pretrained(base))
    assert blueprint.is_empty  # read layer by layer
    blueprint.materialise(blueprint.decoder, CPU)
    decoder = blueprint.decoder.eval()
    old = tiny.decoder(seed=3, tie_word_embeddings=tied)
    for name, tensor in old.hf.model.state_dict().items():
        assert torch.equal(decoder.hf.model.state_dict()[name], tensor), name
    assert torch.equal(decoder.head.weight, built(kind, pretrained(base)).head.weight)
    assert not torch.equal(decoder.head.weight, built(kind, pretrained(base), seed=1).head.weight)

    save_pretrained(decoder.hf, decoder.hf.state_dict().items(), tiny.tokenizer(), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == [type(decoder.hf).__name__] and saved["pad_token_id"] == 2
    loaded, report = AUTO[kind].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.num_labels == OUTPUTS[kind]
    theirs = loaded.eval()(input_ids=IDS).logits
    torch.testing.assert_close(scores(decoder)[:, -1] if kind == "outcome" else scores(decoder), theirs)

    again = opened(kind, pretrained(tmp_path / "saved"), seed=5)
    assert again.is_empty
    again.materialise(again.decoder, CPU)
    assert torch.equal(scores(again.decoder.eval()), scores(decoder))


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_what_transformers_has_to_load(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's published files have names of their own."""
    model = tiny.decoder("gpt2", **GPT2).hf
    model.config.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO", logger="llmtrain"):
        decoder = built(kind, pretrained(tmp_path))
    assert "each rank loads the whole model" in caplog.text
    assert torch.equal(decoder.hf.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)
    assert torch.equal(decoder.head.weight, built(kind, pretrained(tmp_path)).head.weight)
    tensors.pop("h.0.mlp.c_fc.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(lambda: opened(kind, pretrained(tmp_path)), "1 of the model's weights are not there.*h.0.mlp.c_fc.weight")


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_from_gguf(kind: str, tmp_path: Path) -> None:
    made = tiny.decoder(max_position_embeddings=32).hf
    write_gguf(made, tmp_path / "tiny.gguf")
    decoder = built(kind, {"kind": "gguf", "file": str(tmp_path / "tiny.gguf")})
    assert torch.equal(decoder.hf.model.layers[1].mlp.up_proj.weight, made.model.layers[1].mlp.up_proj.weight)
    assert decoder.head.weight.shape == (OUTPUTS[kind], 32) and decoder.head.weight.std() > 0


def test_new_tokens_grow_the_embedding_alone(tmp_path: Path) -> None:
    base = adapters.pretrained(tmp_path)
    words = tiny.tokenizer()
    words.add_tokens(["<|user|>"], special_tokens=True)
    recipe = tiny.recipe(model=pretrained(base), algorithm=ALGORITHMS["outcome"])
    blueprint = open_model(recipe, words, 1)
    blueprint.materialise(blueprint.decoder, CPU)
    rows = blueprint.decoder.hf.get_input_embeddings().weight
    torch.testing.assert_close(rows[96], rows[:96].mean(0))


def test_padding_that_ends_answers_is_no_padding(tmp_path: Path) -> None:
    """transformers' forward would read the score at the token before the end."""
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    recipe = tiny.recipe(algorithm=ALGORITHMS["outcome"])
    assert open_model(recipe, words).decoder.hf.config.pad_token_id is None


# ----------------------------------------------------------------------------------------- refused


def test_an_architecture_without_such_a_head() -> None:
    olmo = {"kind": "config", "architecture": "olmo2", "config": tiny.LLAMA}
    assert built("outcome", olmo).scoring_head == "score"
    error = refused(lambda: opened("process", olmo), "no AutoModelForTokenClassification for 'olmo2'")
    assert error.where == "model.architecture" and "llama" in (error.remedy or "")
    granite = {"kind": "config", "architecture": "granite", "config": tiny.LLAMA}
    refused(lambda: opened("outcome", granite), "no AutoModelForSequenceClassification for 'granite'")


def test_a_model_whose_score_is_more_than_its_head() -> None:
    """It has a dense layer before it."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"kind": "config", "architecture": "modernbert-decoder", "config": shape}
    decoder = built("outcome", model)
    refused(lambda: check_head(Asked(decoder, decoder, CPU, exact=True)), "does not score by its head")


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_scores_is_no_language_model(tied: bool, tmp_path: Path) -> None:
    scorers.write(tmp_path / "outcome", "outcome", tie_word_embeddings=tied)
    scorers.write(tmp_path / "process", "process", tie_word_embeddings=tied)
    error = refused(lambda: opened("causal_lm", pretrained(tmp_path / "outcome")), "is a reward model")
    assert error.where == "model.path" and "(LlamaForSequenceClassification)" in error.message
    refused(lambda: opened("outcome", pretrained(tmp_path / "process")), "process reward model.*a reward model is want")
    refused(lambda: opened("process", pretrained(tmp_path / "outcome")), "a process reward model is wanted")


def test_a_head_of_another_size(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=96, num_labels=5, **tiny.LLAMA)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    refused(lambda: opened("outcome", pretrained(tmp_path)), "in another shape: score.weight")


def test_half_a_head_is_not_filled_up(tmp_path: Path) -> None:
    scorers.write(tmp_path, "process")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("score.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(lambda: opened("process", pretrained(tmp_path)), "1 of the model's weights are not there.*score.bias")


# ----------------------------------------------------------------------------------- another model


def test_another_model_predicts_tokens_and_is_named_as_the_recipe_does(tmp_path: Path) -> None:
    recipe = tiny.recipe(algorithm=ALGORITHMS["outcome"])
    base = adapters.pretrained(tmp_path)
    spec = ModelFromPretrained(kind="pretrained", path=str(base))
    assert open_other_model(spec, recipe, tiny.tokenizer()).decoder.scoring_head is None
    wrong = ModelFromPretrained(kind="pretrained", path=str(tmp_path / "nowhere"))
    for where in ("model", "algorithm.teacher"):
        error = refused(lambda where=where: open_other_model(wrong, recipe, tiny.tokenizer(), where), "")
        assert error.where == f"{where}.path"
    misspelt = ModelFromConfig(kind="config", architecture="llama", config={"hidden_sise": 1})
    error = refused(lambda: open_other_model(misspelt, recipe, tiny.tokenizer(), "algorithm.teacher"), "hidden_sise")
    assert error.where == "algorithm.teacher.config.hidden_sise"
