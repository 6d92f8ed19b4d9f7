"""Models from a config and a directory, and the export; what is wrong is told and never guessed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.models.hub import open_model
from llmtrain.models.saving import save_pretrained
from tests import tiny

IDS = torch.arange(3, 23)[None]
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


def built(model: dict[str, Any], **overrides: Any) -> PreTrainedModel:
    blueprint = open_model(tiny.recipe(model=model, **overrides), tiny.tokenizer())
    blueprint.materialise(blueprint.decoder, torch.device("cpu"))
    return blueprint.decoder.hf


def from_config(architecture: str = "llama", *, shape: dict[str, Any] = tiny.LLAMA, **fields: Any) -> PreTrainedModel:
    return built({"kind": "config", "architecture": architecture, "config": shape | fields})


def from_directory(path: Path, rope: dict[str, Any] | None = None, **overrides: Any) -> PreTrainedModel:
    model = {"kind": "pretrained", "path": str(path), "rope_parameters": rope}
    return built(model, **overrides)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Tensor = model.eval()(input_ids=IDS).logits
    return output


def rotation(model: PreTrainedModel, position: int) -> tuple[Tensor, Tensor]:
    """cos and sin that a position's queries and keys are rotated by."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[position]]))
    return cos, sin


def refused(make: Callable[[], object]) -> InputError:
    with pytest.raises(InputError) as caught:
        make()
    return caught.value


# ------------------------------------------------------------------------------- from a config


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("llama", tiny.LLAMA),
        ("qwen3", tiny.LLAMA | {"head_dim": 8}),
        ("mamba2", {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "num_hidden_layers": 2}),
        ("gpt2", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ],
)
def test_every_architecture_takes_the_tokenizer_and_the_seed(architecture: str, shape: dict[str, Any]) -> None:
    model = from_config(architecture, shape=shape)
    config = model.config
    assert config.model_type == architecture
    assert config.vocab_size == model.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.hidden_size == 32
    other = built({"kind": "config", "architecture": architecture, "config": shape}, seed=1)
    for a, b in zip(model.parameters(), from_config(architecture, shape=shape).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("architecture", "fields", "where", "message"),
    [
        ("llama", {"hidden_sise": 32}, "model.config.hidden_sise", "has no field .*; did you mean 'hidden_size'"),
        ("qwen3", {"n_positions": 32}, "model.config.n_positions", "Qwen3Config has no field 'n_positions'"),
        ("mamba2", {"state_sise": 8}, "model.config.state_sise", "did you mean 'state_size'"),
        ("llama", {"hidden_size": "32"}, "model.config", "'hidden_size' expected int, got str"),
        ("llama", {"num_attention_heads": 5}, "model.config", "not a multiple of the number of attention heads"),
        ("llama", {"num_key_value_heads": 0}, "model", "division"),
        ("lama", {}, "model.architecture", "no decoder of type 'lama'; did you mean 'llama'"),
        ("t5", {}, "model.architecture", "no decoder of type 't5'"),
        ("llama", {"model_type": "qwen3"}, "model.config.model_type", "set by model.architecture"),
        ("llama", {"dtype": "bfloat16"}, "model.config.dtype", "set by precision"),
        ("gpt2", {"n_embd": 32}, "model.config.n_embd", "another name of n_embd, which is given too"),
        ("llama", {"vocab_size": 95}, "model.config.vocab_size", "95 token ids and the tokenizer 96"),
        ("llama", {"max_position_embeddings": 31}, "sequence_length", "rows of 32 tokens, .* made for 31"),
        ("gpt2", {"n_positions": 31}, "sequence_length", "rows of 32 tokens, .* made for 31"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused(architecture: str, fields: dict[str, Any], where: str, message: str) -> None:
    shape = {"num_hidden_layers": 2} if architecture == "mamba2" else {"hidden_size": 32, "num_attention_heads": 4}
    error = refused(lambda: from_config(architecture, shape=shape, **fields))
    assert error.where == where
    with pytest.raises(InputError, match=message):
        raise error


def test_fields_are_taken_by_either_name() -> None:
    """GPT-2 calls it n_positions; a default under the common name does not overrule it."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    assert from_config("gpt2", shape=shape, n_positions=64).config.max_position_embeddings == 64
    assert from_config("gpt2", shape=shape, max_position_embeddings=64).transformer.wpe.weight.shape[0] == 64
    assert from_config("gpt2", shape=shape).config.n_positions == 32


def test_a_larger_vocabulary_is_kept() -> None:
    assert from_config(vocab_size=128).get_input_embeddings().weight.shape[0] == 128


def test_pure_bf16_keeps_the_rotary_frequencies_in_float32() -> None:
    """bf16 has 8 bits: positions beyond 256 would collapse."""
    model = {"kind": "config", "architecture": "llama", "config": tiny.LLAMA}
    half, full = built(model, precision="bf16"), built(model)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    frequencies = half.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, full.model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in built(model, precision="bf16_autocast").parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("parameters", [{"rope_type": "linear", "factor": 4.0}, YARN, LLAMA3])
def test_rope_scaling_is_really_used(architecture: str, parameters: dict[str, Any]) -> None:
    plain = from_config(architecture)
    scaled = from_config(architecture, rope_parameters=parameters)
    assert not torch.equal(plain.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq)
    assert not torch.allclose(logits(plain), logits(scaled), atol=1e-4)


def test_linear_scaling_by_f_at_position_f_m_is_no_scaling_at_m() -> None:
    plain, scaled = from_config(), from_config(rope_parameters={"rope_type": "linear", "factor": 4.0})
    for position in (0, 1, 5, 31):
        for a, b in zip(rotation(plain, position), rotation(scaled, 4 * position), strict=True):
            torch.testing.assert_close(a, b)


def test_yarn_has_its_attention_temperature() -> None:
    """0.1 ln(factor) + 1, arXiv 2309.00071."""
    cos, _ = rotation(from_config(rope_parameters=YARN), 0)
    torch.testing.assert_close(cos.max().item(), 1.1386, rtol=0, atol=1e-4)


def test_dynamic_ntk_begins_beyond_the_window() -> None:
    """Up to max_position_embeddings nothing changes; beyond it the base grows with the length."""
    plain, dynamic = from_config(), from_config(rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    assert torch.equal(rotation(plain, 31)[0], rotation(dynamic, 31)[0])
    length, window, factor, dim = 65, 32, 4.0, 8
    rotation(dynamic, length - 1)
    base = 10000.0 * (factor * length / window - (factor - 1)) ** (dim / (dim - 2))
    torch.testing.assert_close(
        dynamic.model.rotary_emb.inv_freq, base ** -(torch.arange(0, dim, 2) / dim), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarnn", "factor": 4.0}, "unknown rope_type 'yarnn'; did you mean 'yarn'.*allowed: default"),
        ({"rope_type": "linear"}, "Missing required keys.*factor"),
        ({"rope_type": "llama3", "factor": 4.0}, "Missing required keys.*low_freq_factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor field must be a float or int >= 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "Unrecognized keys.*beta_fast"),
    ],
)
def test_wrong_rope_parameters_are_refused(parameters: Any, message: str, model_directory: Path) -> None:
    with pytest.raises(InputError, match=f"model.config.*{message}"):
        from_config(rope_parameters=parameters)
    with pytest.raises(InputError, match=f"model.rope_parameters.*{message}"):
        from_directory(model_directory, parameters)


def test_rope_parameters_are_a_mapping() -> None:
    error = refused(lambda: from_config(rope_parameters="yarn"))
    assert (error.where, error.message) == ("model.config.rope_parameters", "expected a mapping, given 'yarn'")


def test_a_factor_without_a_rope_type_is_refused(model_directory: Path) -> None:
    assert "factor" in str(refused(lambda: from_config(rope_parameters={"factor": 4.0})))
    error = refused(lambda: from_directory(model_directory, {"factor": 4.0}))
    assert "lacks rope_type" in str(error) and "yarn" in str(error.remedy)


# ---------------------------------------------------------------------------- from a directory


@pytest.fixture(scope="module")
def made() -> PreTrainedModel:
    return tiny.decoder(max_position_embeddings=32).hf


@pytest.fixture(scope="module")
def model_directory(made: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_pretrained(made, made.state_dict().items(), tiny.tokenizer(), path)
    return path


@pytest.fixture
def copied(model_directory: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


def damage(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_weights_of_a_directory(made: PreTrainedModel, model_directory: Path) -> None:
    assert torch.equal(logits(from_directory(model_directory)), logits(made))
    half = from_directory(model_directory, precision="bf16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq)


def test_a_home_directory_is_found(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_directory.parent))
    assert from_directory(Path("~") / model_directory.name).config.vocab_size == tiny.VOCABULARY


def test_missing_weights_are_no_random_ones(copied: Path) -> None:
    damage(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    error = refused(lambda: from_directory(copied))
    assert error.where == "model.path" and error.remedy
    assert "1 of the model's weights are not there" in str(error)
    assert "model.layers.1.mlp.up_proj.weight" in str(error)


def test_weights_of_another_shape_are_told(copied: Path) -> None:
    damage(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    error = refused(lambda: from_directory(copied))
    assert error.where == "model.path" and "model.norm.weight" in str(error)


def test_no_weights_file(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    error = refused(lambda: from_directory(copied))
    assert error.where == "model.path" and "model.safetensors" in str(error)


def test_a_pickle_is_never_read(made: PreTrainedModel, copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    torch.save(made.state_dict(), copied / "pytorch_model.bin")
    assert "model.safetensors" in str(refused(lambda: from_directory(copied)))


@pytest.mark.parametrize(("file", "keep"), [("model.safetensors", 5000), ("config.json", 20)])
def test_torn_files_are_told(copied: Path, file: str, keep: int) -> None:
    (copied / file).write_bytes((copied / file).read_bytes()[:keep])
    assert refused(lambda: from_directory(copied)).where == "model.path"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert refused(lambda: from_directory(tmp_path / "nothing")).where == "model.path"


def test_a_tokenizer_that_does_not_fit(model_directory: Path) -> None:
    recipe = tiny.recipe(model={"kind": "pretrained", "path": str(model_directory)})
    error = refused(lambda: open_model(recipe, tiny.tokenizer(97)))
    assert "96 token ids and the tokenizer 97" in str(error) and error.remedy


def test_rope_scaling_stretches_the_window(made: PreTrainedModel, model_directory: Path) -> None:
    error = refused(lambda: from_directory(model_directory, sequence_length=128))
    assert error.where == "sequence_length" and "rope_parameters" in str(error.remedy)
    for parameters in (YARN, {"rope_type": "linear", "factor": 4.0}, LLAMA3 | {"original_max_position_embeddings": 32}):
        model = from_directory(model_directory, parameters, sequence_length=128)
        assert model.config.max_position_embeddings == 128
        assert model.config.rope_parameters["rope_theta"] == made.config.rope_parameters["rope_theta"]
        assert not torch.equal(model.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq)
    with pytest.raises(InputError, match="rows of 129 tokens"):
        from_directory(model_directory, YARN, sequence_length=129)


def test_dynamic_ntk_keeps_the_window_from_which_it_scales(made: PreTrainedModel, model_directory: Path) -> None:
    """transformers measures the length against max_position_embeddings; a stretched one would switch it off."""
    parameters = {"rope_type": "dynamic", "factor": 4.0}
    model = from_directory(model_directory, parameters)
    assert model.config.max_position_embeddings == 32
    assert not torch.equal(rotation(model, 100)[0], rotation(made, 100)[0])
    assert refused(lambda: from_directory(model_directory, parameters, sequence_length=33)).where == "sequence_length"


def test_rope_scaling_keeps_a_partial_rotation(tmp_path: Path) -> None:
    """GPT-NeoX rotates a quarter of each head; scaling says nothing about that."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    neox = tiny.decoder("gpt_neox", max_position_embeddings=32, **shape).hf
    save_pretrained(neox, neox.state_dict().items(), tiny.tokenizer(), tmp_path)
    scaled = from_directory(tmp_path, {"rope_type": "linear", "factor": 2.0})
    torch.testing.assert_close(2 * scaled.gpt_neox.rotary_emb.inv_freq, neox.gpt_neox.rotary_emb.inv_freq)


def test_rope_parameters_of_a_model_without_rope(tmp_path: Path) -> None:
    gpt2 = tiny.decoder("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=32).hf
    save_pretrained(gpt2, gpt2.state_dict().items(), tiny.tokenizer(), tmp_path)
    assert "GPT2Config has no RoPE" in str(refused(lambda: from_directory(tmp_path, YARN)))
    assert refused(lambda: from_directory(tmp_path, sequence_length=33)).where == "sequence_length"


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_rope_numbers_that_are_none(model_directory: Path, key: str) -> None:
    error = refused(lambda: from_directory(model_directory, YARN | {key: "x"}))
    assert (error.where, error.message) == (f"model.rope_parameters.{key}", "expected a number, given 'x'")


# ------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_model_loads_as_it_was(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = Decoder(tiny.decoder(dtype=dtype, tie_word_embeddings=tied).hf).hf
    assert model.config.use_cache is False
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path)
    assert model.config.use_cache is False  # training goes on without one
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == dtype
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert reloaded.config.use_cache is True
    assert reloaded.config.tie_word_embeddings is tied
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) is tied
    assert torch.equal(logits(reloaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny.tokenizer().get_vocab()
    assert not list(tmp_path.glob("*.bin"))


def test_exported_are_the_given_parameters_and_not_the_models_own(tmp_path: Path) -> None:
    """The averaged weights, or those that shards are gathered into; the config tells their dtype."""
    model, other = tiny.decoder(seed=0).hf, tiny.decoder(seed=1, dtype=torch.bfloat16).hf
    save_pretrained(model, other.state_dict().items(), tiny.tokenizer(), tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits(reloaded), logits(other))


# ---------------------------------------------------------------------------- diffusion models
