"""Models from GGUF files that are written here, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.models.hub import open_model
from llmtrain.models.saving import save_pretrained
from tests import tiny


def as_llama_cpp(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: the halves of a head interleaved."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, file: Path, without: str = "") -> None:
    """A llama as llama.cpp's converter writes it, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == without:
            continue
        for projection, num_heads in heads.items():
            if projection in name:
                tensor = as_llama_cpp(tensor, num_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_gguf(file: Path, **overrides: Any) -> PreTrainedModel:
    recipe = tiny.recipe(model={"kind": "gguf", "file": str(file)}, **overrides)
    return open_model(recipe, tiny.tokenizer()).decoder.hf


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Tensor = model.eval()(input_ids=torch.arange(3, 23)[None]).logits
    return output


@pytest.fixture(scope="module")
def made() -> PreTrainedModel:
    return tiny.decoder(max_position_embeddings=32).hf


def test_gguf_gives_the_model_it_was_made_from_and_can_be_exported(made: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(made, tmp_path / "tiny.gguf")
    model = from_gguf(tmp_path / "tiny.gguf")
    assert torch.equal(logits(model), logits(made))
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded), logits(made))
    assert from_gguf(tmp_path / "tiny.gguf", precision="bf16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="sequence_length: rows of 33 tokens"):
        from_gguf(tmp_path / "tiny.gguf", sequence_length=33)


def test_gguf_without_a_weight_is_no_random_one(made: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(made, tmp_path / "tiny.gguf", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match="model.file: 1 of .* not there.*model.layers.1.mlp.up_proj.weight"):
        from_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_token_that_is_new_to_it_begins_as_the_mean(tied: bool, tmp_path: Path) -> None:
    made = tiny.decoder(max_position_embeddings=32, tie_word_embeddings=tied).hf
    write_gguf(made, tmp_path / "tiny.gguf", without="lm_head.weight" if tied else "")
    words = tiny.tokenizer()
    words.add_tokens(["<|mask|>"], special_tokens=True)
    words.mask_token = "<|mask|>"
    recipe = tiny.recipe(
        model={"kind": "gguf", "file": str(tmp_path / "tiny.gguf")}, algorithm={"kind": "masked_diffusion"}
    )
    grown = open_model(recipe, words, 1).decoder.hf
    for now, before in (
        (grown.get_input_embeddings().weight, made.get_input_embeddings().weight),
        (grown.get_output_embeddings().weight, made.get_output_embeddings().weight),
    ):
        assert torch.equal(now[: tiny.VOCABULARY], before)
        torch.testing.assert_close(now[tiny.VOCABULARY :], before.mean(0, keepdim=True))
    assert (grown.get_input_embeddings().weight is grown.get_output_embeddings().weight) is tied
    assert grown.config.vocab_size == tiny.VOCABULARY + 1


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"no model at all" * 10])
def test_what_is_no_gguf_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tiny.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="model.file: "):
        from_gguf(file)
