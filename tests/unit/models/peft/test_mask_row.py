"""LoRA on a model that is new to the mask token: its row is trained and saved alone, and fits the unchanged base."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmtrain.errors import InputError
from llmtrain.models.attention import bidirectional
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.diffusion import Diffusion, save_diffusion
from llmtrain.models.hub import open_model
from llmtrain.models.merging import merge, probe_rows
from llmtrain.models.peft import Adapter, adapt, save_adapter
from llmtrain.models.saved import load_saved
from tests import adapters, tiny
from tests.adapters import CPU, LORA

MASK, MASK_ID = "<|mask|>", tiny.VOCABULARY
IDS = torch.randint(3, MASK_ID, (4, 9), generator=torch.Generator().manual_seed(2))
HIDDEN = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) < 0.5
NOISY = IDS.where(~HIDDEN, MASK_ID)
ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def tokenizer() -> Any:
    words = tiny.tokenizer()
    words.add_tokens([MASK], special_tokens=True)
    words.mask_token = MASK
    return words


def adapted(base: Path, adapter: dict[str, Any] | None = None, **overrides: Any) -> tuple[nn.Module, Adapter]:
    sections = {"algorithm": {"kind": "masked_diffusion"}, **overrides}
    recipe = adapters.recipe(base, adapter or LORA, **sections)
    blueprint = open_model(recipe, tokenizer(), 1)
    adapter_in_it = adapt(blueprint, recipe, tokenizer())
    assert adapter_in_it is not None
    assert blueprint.is_empty, "layer by layer"
    for layer in [*blueprint.layers, blueprint.decoder]:
        blueprint.materialise(layer, CPU)
    return blueprint.decoder.eval(), adapter_in_it


def trained(model: nn.Module) -> None:
    """Some steps of predicting what is masked; the mask itself has no probability."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss(hidden: Tensor, head: nn.Linear) -> Tensor:
        logits = (hidden @ head.weight.T)[HIDDEN]
        logits = logits.index_fill(1, torch.tensor([MASK_ID]), -1e9)
        return nn.functional.cross_entropy(logits, IDS[HIDDEN])

    for _ in range(5):
        model(NOISY, torch.arange(9).expand_as(NOISY), loss, bidirectional).backward()
        optimizer.step()
        optimizer.zero_grad()


def without_mask(logits: Tensor) -> Tensor:
    """The mask's own logit is used nowhere, and the bases differ in what it is."""
    return logits.index_fill(-1, torch.tensor([MASK_ID]), 0.0)[..., : MASK_ID + 1]


@torch.no_grad()
def plain_logits(model: nn.Module) -> Tensor:
    return without_mask(model(input_ids=NOISY).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocabulary", [96, 128])
@pytest.mark.parametrize("kind", ["lora", "lora, dora", "lora, pissa"])
def test_the_row_is_trained_and_fits_the_unchanged_base(kind: str, vocabulary: int, tied: bool, tmp_path: Path) -> None:
    """128: the base has rows to spare, with values of their own."""
    base = adapters.pretrained(tmp_path / "base", vocab_size=vocabulary, tie_word_embeddings=tied)
    old = AutoModelForCausalLM.from_pretrained(base)
    model, adapter = adapted(base, adapters.KINDS[kind])
    mean = old.get_input_embeddings().weight[:MASK_ID].mean(0)
    row = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    torch.testing.assert_close(row.detach(), mean.unsqueeze(0).detach())
    trained(model)
    assert (row - mean).abs().max() > 0.01
    ours = without_mask(adapters.logits(model, NOISY))

    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, adapters.stream(model), tokenizer(), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors[ROW], row)
    assert not [name for name in tensors if name != ROW and "lora_" not in name], "nothing else of the embedding"

    save_diffusion(Diffusion("masked", MASK_ID, shift=False), tmp_path / "adapter")
    saved = load_saved(str(tmp_path / "adapter"))
    assert type(saved.decoder.get_output_embeddings()) is nn.Linear
    torch.testing.assert_close(without_mask(saved.logits(NOISY)), ours, rtol=1e-5, atol=1e-5)
    if vocabulary == 96:  # who uses peft makes room for the token, as for any new one
        old.resize_token_embeddings(MASK_ID + 1)
    plain = peft.PeftModelForCausalLM.from_pretrained(old, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(plain_logits(plain), ours, rtol=1e-5, atol=1e-5)
    merged, _ = merge(load_saved(str(tmp_path / "adapter"), dtype="float32"), probe_rows(saved.decoder))
    torch.testing.assert_close(plain_logits(merged), ours, rtol=1e-4, atol=1e-4)


def test_the_head_is_the_models_own(tmp_path: Path) -> None:
    """A tied head is read by the loss as the matrix that it is."""
    base = adapters.pretrained(tmp_path, tie_word_embeddings=True)
    model, adapter = adapted(base)
    head = model.hf.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight is model.hf.get_input_embeddings().token_adapter.base_layer.weight
    assert model.num_matmul_parameters() == model.num_parameters()
    assert model.num_frozen_matmul_parameters() == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert adapter.config.trainable_token_indices == {"embed_tokens": [MASK_ID]}


def test_beside_a_head_that_is_trained_whole(tmp_path: Path) -> None:
    model, adapter = adapted(adapters.pretrained(tmp_path / "base"), LORA | {"modules_to_save": ["lm_head"]})
    assert adapter.config.trainable_token_indices == {"embed_tokens": [MASK_ID]}
    trained(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, adapters.stream(model), tokenizer(), tmp_path / "adapter")
    save_diffusion(Diffusion("masked", MASK_ID, shift=False), tmp_path / "adapter")
    ours = without_mask(adapters.logits(model, NOISY))
    torch.testing.assert_close(without_mask(load_saved(str(tmp_path / "adapter")).logits(NOISY)), ours)


def test_a_token_that_the_model_has_keeps_its_row(tmp_path: Path) -> None:
    base = adapters.pretrained(tmp_path, vocab_size=MASK_ID + 1)
    words = tokenizer()
    words.save_pretrained(tmp_path)
    recipe = adapters.recipe(base, LORA, algorithm={"kind": "masked_diffusion"})
    blueprint = open_model(recipe, words)
    adapter = adapt(blueprint, recipe, words)
    assert adapter is not None
    assert adapter.config.trainable_token_indices is None
    blueprint.materialise(blueprint.decoder, CPU)
    expected = tiny.decoder(seed=3, vocab_size=MASK_ID + 1).hf.get_input_embeddings().weight
    assert torch.equal(blueprint.decoder.hf.get_input_embeddings().weight, expected)


def test_on_top_of_an_adapter_that_brought_it(tmp_path: Path) -> None:
    """The one below is merged, with its row for the mask; the next one trains the row on from there."""
    base = adapters.pretrained(tmp_path / "base", tie_word_embeddings=True)
    below, adapter = adapted(base)
    trained(below)
    (tmp_path / "below").mkdir()
    save_adapter(adapter, adapters.stream(below), tokenizer(), tmp_path / "below")
    recipe = adapters.recipe(base, LORA | {"base": [str(tmp_path / "below")]}, algorithm={"kind": "masked_diffusion"})
    blueprint = open_model(recipe, tokenizer(), 1)
    top = adapt(blueprint, recipe, tokenizer())
    assert top is not None
    blueprint.materialise(blueprint.decoder, CPU)
    model = blueprint.decoder.eval()
    torch.testing.assert_close(
        without_mask(adapters.logits(model, NOISY)), without_mask(adapters.logits(below, NOISY)), rtol=1e-4, atol=1e-4
    )
    trained(model)
    (tmp_path / "top").mkdir()
    save_adapter(top, adapters.stream(model), tokenizer(), tmp_path / "top")
    saved = load_saved(str(tmp_path / "top"))
    torch.testing.assert_close(
        without_mask(saved.logits(NOISY)), without_mask(adapters.logits(model, NOISY)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "adapter", [{"kind": "ia3"}, LORA | {"target_modules": ["embed_tokens", "q_proj"]}], ids=["ia3", "on the embedding"]
)
def test_adapters_that_would_lose_it(adapter: dict[str, Any], tmp_path: Path) -> None:
    base = adapters.pretrained(tmp_path)
    with pytest.raises(InputError, match=r"1 new embeddings by algorithm.mask_token \(<\|mask\|>\)") as caught:
        adapted(base, adapter)
    assert caught.value.where == "adapter.modules_to_save"
    whole = adapter | {"modules_to_save": ["embed_tokens"]}
    if adapter["kind"] == "ia3":
        adapted(base, whole)


def test_on_weights_in_four_bits(tmp_path: Path) -> None:
    """Where the model has a row to spare; the embedding is not in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="pip install 'llmtrain[qlora]' enables this")

    def in_four_bits(base: Path) -> tuple[Blueprint, Adapter | None]:
        section = {"kind": "pretrained", "path": str(base), "quantization": "nf4"}
        recipe = adapters.recipe(base, LORA, model=section, device="cpu", algorithm={"kind": "masked_diffusion"})
        blueprint = open_model(recipe, tokenizer(), 1)
        return blueprint, adapt(blueprint, recipe, tokenizer())

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    spare = adapters.pretrained(tmp_path / "spare", vocab_size=128, **sizes)
    blueprint, adapter = in_four_bits(spare)
    blueprint.materialise(blueprint.decoder, CPU)
    model = blueprint.decoder.eval()
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert adapter is not None and adapter.config.trainable_token_indices == {"embed_tokens": [MASK_ID]}
    row = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    before = row.detach().clone()
    trained(model)
    assert not torch.equal(row, before)
    with pytest.raises(InputError, match="it has 96 embeddings, and 97 are needed") as caught:
        in_four_bits(adapters.pretrained(tmp_path / "full", **sizes))
    assert caught.value.where == "algorithm.mask_token"
