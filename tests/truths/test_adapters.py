"""Adapters against peft itself: what is trained, what is saved, and what the saved does in plain peft."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmtrain.models.checks import Asked, check_causality, check_document_isolation, check_head
from llmtrain.models.decoder import Decoder
from llmtrain.models.peft import save_adapter
from llmtrain.sampling.autoregressive import continue_prompts
from tests import adapters, tiny
from tests.adapters import CPU, IDS, KINDS

PROMPTS = [kind for kind, adapter in KINDS.items() if adapter["kind"] in ("prompt_tuning", "p_tuning", "prefix_tuning")]
# They have no matrix that could be added to the weights.
UNMERGEABLE = ("p_tuning", "prefix_tuning", "prompt_tuning")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.pretrained(tmp_path_factory.mktemp("base"))


def plain_base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the text, and not of what an adapter puts before it."""
    result: Tensor = model(input_ids=ids).logits
    return result[:, -ids.shape[1] :]


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_does_the_same_in_plain_peft(kind: str, base: Path, tmp_path: Path) -> None:
    model, adapter = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    before = frozen(model)
    losses = adapters.trained(model)
    assert losses[-1] < losses[0]
    for name, tensor in frozen(model).items():
        assert torch.equal(tensor, before[name]), f"{name} is frozen and has changed"
    ours = adapters.logits(model, IDS)

    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain_base(base), str(tmp_path)).eval()
    torch.testing.assert_close(plain_logits(loaded, IDS), ours, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["inference_mode"] is True
    assert (tmp_path / "tokenizer.json").is_file()
    if KINDS[kind]["kind"] not in UNMERGEABLE:
        torch.testing.assert_close(plain_logits(loaded.merge_and_unload(), IDS), ours, rtol=1e-5, atol=1e-5)


LIKE_PEFT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "lora, dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "lora, pissa": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"),
    "lora, olora": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="olora"),
    "lora, by pattern": peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q|v)_proj"),
    "ia3": peft.IA3Config(),
    "MISS": peft.MissConfig(r=8, target_modules=["q_proj", "up_proj"]),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=3),
    "prefix_tuning, projection": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
}


@pytest.mark.parametrize("kind", LIKE_PEFT)
def test_what_is_trained_is_what_peft_would_train(kind: str, base: Path) -> None:
    """Equally many, in the same shapes; and where nothing is random in an initialisation, the same values."""
    model, _ = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    config = LIKE_PEFT[kind]
    config.task_type = "CAUSAL_LM"
    theirs = peft.get_peft_model(plain_base(base), config)
    ours = [p for p in model.parameters() if p.requires_grad]
    expected = [p for p in theirs.parameters() if p.requires_grad]
    assert sorted(tuple(p.shape) for p in ours) == sorted(tuple(p.shape) for p in expected)
    if kind in ("lora, pissa", "lora, olora", "ia3", "MISS"):
        values = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
        for name, parameter in model.named_parameters():
            if ".initial." not in name:
                short = name.removeprefix(Decoder.PREFIX)
                torch.testing.assert_close(parameter, values[short], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["lora", "lora, dora", "prompt_tuning", "p_tuning"])
def test_an_adapter_begins_the_same_however_the_model_was_made(kind: str, base: Path) -> None:
    """Layer by layer or in one go, and the same again for the same seed."""
    asked = adapters.recipe(base, KINDS[kind])
    first, _ = adapters.materialised(asked)
    blueprint, _ = adapters.adapted(asked)
    for layer in [*blueprint.layers, blueprint.decoder]:
        blueprint.materialise(layer, CPU)
    other, _ = adapters.materialised(asked.model_copy(update={"seed": 1}))
    differs = False
    for name, parameter in blueprint.decoder.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)), name
        differs |= not torch.equal(parameter, other.get_parameter(name))
    assert differs, "another seed draws the same"


# ------------------------------------------------------------------------------------ before the text


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_is_before_every_document_as_in_peft(kind: str, base: Path, tmp_path: Path) -> None:
    """Logits of packed documents are those of peft on each alone."""
    model, adapter = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    adapters.trained(model, 3)
    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain_base(base), str(tmp_path)).eval()
    lengths = [[11]] if "prefix" in kind else [[4, 7], [11], [1, 1, 9]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    ids = IDS[: len(lengths)]
    ours = adapters.logits(model, ids, positions)
    for row, documents in enumerate(lengths):
        for tokens, logits in zip(ids[row].split(documents), ours[row].split(documents), strict=True):
            torch.testing.assert_close(logits[None], plain_logits(loaded, tokens[None]), rtol=1e-5, atol=1e-5)


def test_rows_of_different_length_with_a_prefix(base: Path) -> None:
    """Padding on the right, a document of its own, changes nothing before it."""
    model, _ = adapters.materialised(adapters.recipe(base, KINDS["prefix_tuning"]))
    adapters.trained(model, 3)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    padded = adapters.logits(model, IDS[:1], positions)[:, :6]
    alone = adapters.logits(model, IDS[:1, :6], positions[:, :6])
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_the_checks_of_models_hold_and_samples_come(kind: str, base: Path) -> None:
    model, _ = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    adapters.trained(model, 3)
    assert isinstance(model, Decoder)
    asked = Asked(model, model, CPU, exact=True)
    check_head(asked)
    check_causality(asked)
    if kind != "prefix_tuning":
        check_document_isolation(asked, num_rows=2)
    drawn = continue_prompts(
        model, [[3, 4], [5]], max_new_tokens=4, temperature=0.0, eos_id=1, max_length=16, device=CPU, seed=0
    )
    assert all(0 < len(tokens) <= 4 for tokens in drawn)


def test_a_prompt_takes_from_the_models_positions(base: Path) -> None:
    model, _ = adapters.materialised(adapters.recipe(base, KINDS["prompt_tuning"]))
    assert isinstance(model, Decoder)
    assert model.max_length(default=5) == tiny.decoder().max_length(default=5) - 3


# ---------------------------------------------------------------------------------- on top of each other


@pytest.mark.parametrize("under", ["lora", "lora, dora", "LOHA"])
def test_an_adapter_on_top_of_another(under: str, base: Path, tmp_path: Path) -> None:
    """The one below is merged into the weights, as peft merges it; both are in what is saved."""
    below, below_adapter = adapters.materialised(adapters.recipe(base, KINDS[under]))
    adapters.trained(below)
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    save_adapter(below_adapter, adapters.stream(below), tiny.tokenizer(), first)

    model, adapter = adapters.materialised(adapters.recipe(base, KINDS["lora"] | {"base": [str(first)]}))
    torch.testing.assert_close(adapters.logits(model, IDS), adapters.logits(below, IDS), rtol=1e-5, atol=1e-5)
    adapters.trained(model, 3)
    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), second)
    merged = peft.PeftModel.from_pretrained(plain_base(base), str(second / "base-0")).merge_and_unload()
    loaded = peft.PeftModel.from_pretrained(merged, str(second)).eval()
    torch.testing.assert_close(plain_logits(loaded, IDS), adapters.logits(model, IDS), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- four bits


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["lora", "lora, dora", "prompt_tuning"])
def test_on_weights_in_four_bits(kind: str, quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'llmtrain[qlora]' enables this")
    from transformers import BitsAndBytesConfig

    base = adapters.pretrained(tmp_path / "base", hidden_size=64, intermediate_size=128)
    section = {"kind": "pretrained", "path": str(base), "quantization": quantization}
    asked = adapters.recipe(base, KINDS[kind], model=section, device="cpu")
    model, adapter = adapters.materialised(asked)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    losses = adapters.trained(model)
    assert losses[-1] < losses[0]
    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map={"": "cpu"})
        loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(plain_logits(loaded, IDS), adapters.logits(model, IDS), rtol=1e-4, atol=1e-4)
