"""Models, runs and adapters, as the commands that use a trained model find and load them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.errors import InputError
from llmtrain.models.diffusion import save_diffusion
from llmtrain.models.saved import load_saved, locate
from tests import tiny
from tests.diffusion import BLOCK, MASKED, write_diffusion_model
from tests.saved import ADAPTERS, write_adapter, write_model

IDS = torch.arange(3, 33).view(2, 15)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("saved") / "base")


@torch.no_grad()
def plain_logits(base: Path, adapter: Path) -> Tensor:
    """What peft itself computes."""
    model = peft.PeftModelForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    logits: Tensor = model(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_computes_what_peft_does(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, kind)
    saved = load_saved(str(adapter))
    assert saved.location.base == str(base)
    torch.testing.assert_close(saved.logits(IDS), plain_logits(base, adapter), rtol=1e-5, atol=1e-5)
    assert (saved.logits(IDS) - load_saved(str(base)).logits(IDS)).abs().max() > 0.01
    assert saved.window == (64 if saved.virtual is None else 59)


def test_transformers_draws_no_progress_of_its_own(base: Path) -> None:
    """In a process of its own: whatever else was imported here may have silenced it."""
    program = f"from llmtrain.models.saved import load_saved; load_saved({str(base)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr


def test_a_run_means_its_final_model(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(base, run / "final")
    (run / "recipe.resolved.yaml").write_text("name: mine\n")
    assert locate(str(run)).path == str(run / "final")
    assert locate(str(run)).run == run
    assert locate(str(run / "final")).run == run
    assert locate(str(base)).run is None


def test_dtypes(base: Path) -> None:
    assert load_saved(str(base)).decoder.dtype == torch.float32
    assert load_saved(str(base), dtype="bfloat16").decoder.dtype == torch.bfloat16


def test_the_base_of_an_adapter_that_was_moved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def named(name: object) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    named("models/base")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="its base model is not there: models/base\n.*--base") as error:
        load_saved("adapter")
    assert "adapter_config.json" in str(error.value)
    assert load_saved("adapter", base=str(base)).location.base == str(base)
    shutil.copytree(base, "models/base")
    assert load_saved("adapter").location.base == "models/base"  # relative to where the command is given
    shutil.move("models", adapter / "models")
    assert load_saved("adapter").location.base == "adapter/models/base"  # or beside the adapter
    named(None)
    with pytest.raises(InputError, match="does not say which model it was made for"):
        load_saved("adapter")


def test_new_tokens_of_an_adapter(base: Path, tmp_path: Path) -> None:
    """The base has no rows for them; the adapter holds them, trained."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 3)
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer(tiny.VOCABULARY + 3).save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, tiny.VOCABULARY + 2, 5]])
    for given in (None, str(base)):
        saved = load_saved(str(tmp_path / "adapter"), base=given)
        with torch.no_grad():
            torch.testing.assert_close(saved.logits(ids), adapted(input_ids=ids).logits)


def test_a_base_of_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    """Its weights have the same shapes, and so the adapter's fit."""
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    tiny.tokenizer().save_pretrained(adapter)
    smaller = write_model(tmp_path / "smaller", vocab_size=64)
    with pytest.raises(InputError, match=r"--base: .*smaller has embeddings of 64 tokens, and the .* has 96"):
        load_saved(str(adapter), base=str(smaller))
    larger = write_model(tmp_path / "larger", vocab_size=128)
    assert load_saved(str(adapter), base=str(larger)).decoder.vocab_size == 128, "rows that no token has"
    tiny.tokenizer(128).save_pretrained(larger)
    with pytest.raises(InputError, match=r"larger has 128 tokens, of which 96 is 'w96', and .* 96 is None") as caught:
        load_saved(str(adapter), base=str(larger))
    assert "--base" in str(caught.value.remedy) and str(adapter) in str(caught.value)
    same_size = Path(shutil.copytree(base, tmp_path / "same-size"))
    tokenizer = same_size / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w50"', '"word"'))
    with pytest.raises(InputError, match="of which 50 is 'word', and .* of which 50 is 'w50'"):
        load_saved(str(adapter), base=str(same_size))
    shutil.rmtree(smaller)
    write_model(smaller, vocab_size=64)
    for file in smaller.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="embeddings of 64 tokens"):
        load_saved(str(adapter), base=str(smaller))


def test_a_base_without_the_adapters_added_tokens_is_its_own(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save_pretrained(adapter)
    saved = load_saved(str(adapter), base=str(base))
    assert saved.decoder.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY + 2


def test_a_base_whose_own_tokenizer_is_none_to_train_with_serves(base: Path, tmp_path: Path) -> None:
    """It is not used: the adapter's is."""
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    tiny.tokenizer().save_pretrained(adapter)
    endless = Path(shutil.copytree(base, tmp_path / "endless"))
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    assert torch.equal(load_saved(str(adapter), base=str(endless)).logits(IDS), load_saved(str(adapter)).logits(IDS))


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    adapters = [str(write_adapter(tmp_path / name, base, "lora")) for name in ("one", "other")]
    with pytest.raises(InputError, match=r"--base: .*other is an adapter, too\n.*give the whole model"):
        load_saved(adapters[0], base=adapters[1])


def test_adapters_on_top_of_adapters(base: Path, tmp_path: Path) -> None:
    """Those below lie in base-0, base-1, ... of the adapter's directory, and are merged in this order."""
    below = write_adapter(tmp_path / "below", base, "lora")
    merged = peft.PeftModelForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(base), below)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    top = write_adapter(tmp_path / "top", base, "ia3")
    shutil.copytree(below, top / "base-0")
    expected = plain_logits(tmp_path / "merged", top)
    torch.testing.assert_close(load_saved(str(top)).logits(IDS), expected, rtol=1e-4, atol=1e-4)


def test_one_that_is_in_no_weights_carries_no_other(base: Path, tmp_path: Path) -> None:
    top = write_adapter(tmp_path / "top", base, "ia3")
    shutil.copytree(write_adapter(tmp_path / "below", base, "lora", lora_bias=True), top / "base-0")
    with pytest.raises(InputError, match="LORA cannot be merged: .*the base layer has no bias") as caught:
        load_saved(str(top))
    assert caught.value.where == str(top / "base-0")


def test_what_is_wrong_with_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(tensors)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != first}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match=f"1 of the adapter's weights are not there: {first}"):
        load_saved(str(adapter))
    save_file(tensors | {first: torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="the adapter does not fit on"):
        load_saved(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="no such file: adapter_model.safetensors.*\n.*pickled weights are not read"):
        load_saved(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config.json: cannot be read as peft's configuration"):
        load_saved(str(adapter))


def test_how_a_diffusion_model_is_used(base: Path, tmp_path: Path) -> None:
    """Said beside the weights, or the adapter: its base is then none, or another one."""
    assert load_saved(str(base)).diffusion is None
    model = write_diffusion_model(tmp_path / "model", BLOCK)
    assert load_saved(str(model)).diffusion == BLOCK
    autoregressive = write_adapter(tmp_path / "autoregressive", model, "lora")
    assert load_saved(str(autoregressive)).diffusion is None
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    save_diffusion(MASKED, adapter)
    assert load_saved(str(adapter)).diffusion == MASKED
    save_diffusion(replace(MASKED, mask_token_id=10**6), adapter)
    with pytest.raises(InputError, match=r"mask_token_id is 1000000, and the model has embeddings of \d+ tokens"):
        load_saved(str(adapter))
    virtual = write_adapter(tmp_path / "virtual", base, "prompt_tuning")
    save_diffusion(MASKED, virtual)
    with pytest.raises(InputError, match="PROMPT_TUNING puts tokens before causal text"):
        load_saved(str(virtual))


def test_what_is_no_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        load_saved(str(tmp_path))
    with pytest.raises(InputError, match="no such directory"):
        load_saved(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="--base: .*is a whole model"):
        load_saved(str(base), base=str(base))
    (tmp_path / "recipe.resolved.yaml").touch()
    with pytest.raises(InputError, match="is not finished"):
        load_saved(str(tmp_path))
