"""The export: in files of a bounded size, written as the weights come."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.models.saving import save_pretrained
from tests import tiny


def assert_loads_as(directory: Path, model: Any) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_files_of_any_size_load_as_one_model(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    model = tiny.decoder(tie_word_embeddings=tied).hf
    # As engines give them: tied weights twice, each a tensor of its own.
    copies = ((name, tensor.clone()) for name, tensor in model.state_dict().items())
    save_pretrained(model, copies, tiny.tokenizer(), tmp_path, shard_bytes)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        for file in files:
            tensors = load_file(tmp_path / file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes
            assert all(index["weight_map"][name] == file for name in tensors)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert_loads_as(tmp_path, model)
    assert (tmp_path / "generation_config.json").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_no_more_than_a_file_is_held(tmp_path: Path) -> None:
    model = tiny.decoder(num_hidden_layers=8).hf
    written: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, tensor
            written.append(len(list(tmp_path.glob("*.safetensors"))))

    save_pretrained(model, stream(), tiny.tokenizer(), tmp_path, 30_000)
    assert written == sorted(written) and written[len(written) // 2] >= 2


def test_what_transformers_renames_is_saved_under_its_names(tmp_path: Path) -> None:
    shape = {"num_local_experts": 2, "num_experts_per_tok": 1} | tiny.LLAMA
    model = tiny.decoder("mixtral", **shape).hf
    save_pretrained(model, model.state_dict().items(), tiny.tokenizer(), tmp_path)
    assert any("w1" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_loads_as(tmp_path, model)
