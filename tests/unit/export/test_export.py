"""`llmtrain export`: what comes out loads elsewhere and computes the same."""

import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtrain.models import merging
from llmtrain.models.diffusion import load_diffusion, save_diffusion
from tests.diffusion import BLOCK_SHIFTED, MASK
from tests.saved import ADAPTERS, CommandLine, assert_refused, write_adapter, write_model

IDS = torch.arange(3, 33).view(2, 15)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("export") / "base")
    GenerationConfig(eos_token_id=[1, 7], max_new_tokens=9).save_pretrained(directory)
    card = "---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n# Tiny\n"
    (directory / "README.md").write_text(card)
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found.float()


def with_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModelForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def metadata(directory: str) -> dict[str, Any]:
    front = Path(directory, "README.md").read_text().split("---\n")[1]
    found: dict[str, Any] = yaml.safe_load(front)
    return found


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "ia3": ("ia3", {}),
    "modules_to_save": ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_merged_adapter_computes_what_the_two_did(
    llmtrain: CommandLine, base: Path, tmp_path: Path, name: str
) -> None:
    kind, settings = SETTINGS[name]
    adapter = write_adapter(tmp_path / "adapter", base, kind, **settings)
    done = llmtrain("export", "adapter", "--output", "merged")
    assert done.code == 0, done.err
    assert "merged, float32" in done.out
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(with_peft(base, adapter)), rtol=1e-4, atol=1e-4)
    assert not list(Path("merged").glob("adapter*")) and not list(tmp_path.glob(".writing*"))
    generation = GenerationConfig.from_pretrained("merged")
    assert (generation.eos_token_id, generation.max_new_tokens) == ([1, 7], 9)
    assert AutoTokenizer.from_pretrained("merged").chat_template is not None
    found = metadata("merged")
    assert found["base_model"] == "someone/tiny" and found["license"] == "apache-2.0"
    assert found["library_name"] == "transformers" and "llmtrain" in found["tags"]
    assert "llmtrain export adapter --output merged" in Path("merged/README.md").read_text()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj", "saved"])
def test_embedding_and_head_that_were_one(llmtrain: CommandLine, tmp_path: Path, target: str) -> None:
    """peft's own merge puts an adapter of one of them into both."""
    base = write_model(tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    settings = whole if target == "saved" else {"target_modules": [target]}
    config = peft.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    if target == "saved":
        with torch.no_grad():
            adapted.get_input_embeddings().weight.mul_(1.5)
    adapted.save_pretrained("adapter")
    expected = logits(with_peft(base, Path("adapter")))
    done = llmtrain("export", "adapter", "--output", "merged")
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == (target == "q_proj")
    assert ("lm_head.weight" in load_file("merged/model.safetensors")) == (target != "q_proj")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casting(llmtrain: CommandLine, base: Path, dtype: str) -> None:
    assert llmtrain("export", base, "--output", "cast", "--dtype", dtype).code == 0
    weights = load_file("cast/model.safetensors")
    wanted = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in weights.values()} == {wanted}
    original = load_file(base / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, original[name].to(wanted))
    assert json.loads(Path("cast/config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained("cast").dtype == wanted


def test_shards(llmtrain: CommandLine, base: Path) -> None:
    assert llmtrain("export", base, "--output", "shards", "--max-shard-size", "50KB").code == 0
    assert llmtrain("export", base, "--output", "more-shards", "--max-shard-size", "50 KiB").code == 0
    assert len(list(Path("shards").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("shards")), logits(AutoModelForCausalLM.from_pretrained(base))
    )
    assert_refused(
        llmtrain("export", base, "--output", "x", "--max-shard-size", "big"), "--max-shard-size: 'big' is no"
    )


def test_an_adapter_alone(llmtrain: CommandLine, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "prefix_tuning")
    done = llmtrain("export", "adapter", "--output", "alone", "--no-merge")
    assert done.code == 0, done.err
    assert torch.equal(logits(with_peft(base, Path("alone"))), logits(with_peft(base, adapter)))
    assert metadata("alone")["library_name"] == "peft"
    shutil.copytree(base, "moved")
    settings = ("--no-merge", "--base", "moved", "--dtype", "bfloat16")
    assert llmtrain("export", "adapter", "--output", "half", *settings).code == 0
    assert json.loads(Path("half/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        Path("moved").resolve()
    )
    assert next(iter(load_file("half/adapter_model.safetensors").values())).dtype == torch.bfloat16


def test_an_adapter_alone_keeps_those_that_it_stands_on(llmtrain: CommandLine, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    shutil.copytree(write_adapter(tmp_path / "below", base, "ia3"), adapter / "base-0")
    assert llmtrain("export", "adapter", "--output", "alone", "--no-merge").code == 0
    assert Path("alone/base-0/adapter_model.safetensors").is_file()
    assert "with the adapters in base-0, ... merged into it" in Path("alone/README.md").read_text()


@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_how_a_diffusion_model_is_sampled_goes_with_it(
    llmtrain: CommandLine, base: Path, tmp_path: Path, merge: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, "lora")
    save_diffusion(BLOCK_SHIFTED, adapter)
    done = llmtrain("export", "adapter", "--output", "out", merge, "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert load_diffusion(Path("out")) == BLOCK_SHIFTED
    card = Path("out/README.md").read_text()
    for said in ("block of 4 tokens", "row i - 1 of the logits", f"id {MASK}", "llmtrain generate out"):
        assert said in card, card
    ours, theirs = (
        llmtrain(
            "generate", model, "--prompt", "w20 w21", "--max-new-tokens", 8, "--temperature", 0, "--dtype", "float32"
        )
        for model in ("adapter", "out")
    )
    assert (ours.code, theirs.code) == (0, 0), theirs.err
    assert llmtrain("export", base, "--output", "plain").code == 0
    assert load_diffusion(Path("plain")) is None and "## Sampling" not in Path("plain/README.md").read_text()


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in ("lora", "ia3")])
def test_what_cannot_be_merged(llmtrain: CommandLine, base: Path, tmp_path: Path, kind: str) -> None:
    write_adapter(tmp_path / "adapter", base, kind)
    done = llmtrain("export", "adapter", "--output", "merged")
    assert_refused(done, "cannot be merged: what it learnt stands before the text", "remedy: export it with --no-merge")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_with_a_bias_that_the_model_lacks_cannot_be_merged(
    llmtrain: CommandLine, base: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", base, "lora", lora_bias=True)
    done = llmtrain("export", "adapter", "--output", "merged")
    assert_refused(done, "cannot be merged: Impossible to merge", "remedy: export it with --no-merge")


def test_a_merge_that_loses_something_leaves_nothing(
    llmtrain: CommandLine, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "adapter", base, "lora")
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda self, safe_merge: self.unload())
    done = llmtrain("export", "adapter", "--output", "merged")
    assert_refused(done, "merged, the model's logits differ by", "--no-merge", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_small_adapter_that_is_lost_is_noticed() -> None:
    """A bound that only knows rounding would take the base for the merged model."""
    assert merging._MERGE_FLOOR < merging._MERGE_BOUND
    reference, alone = torch.ones(10) * (1 + 1e-4), torch.ones(10)
    effect = merging.difference(reference, alone)
    assert effect > max(merging._MERGE_FLOOR, merging._PART_OF_EFFECT * effect)
    assert merging.difference(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")


def test_weights_that_a_dtype_cannot_hold(llmtrain: CommandLine, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained("large")
    AutoTokenizer.from_pretrained(base).save_pretrained("large")
    done = llmtrain("export", "large", "--output", "cast", "--dtype", "float16")
    assert_refused(done, "written as float16, the model's logits differ by inf", "--dtype float32 or bfloat16", code=1)
    assert not Path("cast").exists() and not list(tmp_path.glob(".writing*"))


def test_the_card_of_a_run(llmtrain: CommandLine, base: Path, tmp_path: Path) -> None:
    from tests.runs import train_here, write_recipe

    run = train_here(write_recipe(tmp_path, steps=3))
    assert llmtrain("export", run, "--output", "handed-on", "--dtype", "bfloat16").code == 0
    text = Path("handed-on/README.md").read_text()
    assert metadata("handed-on")["tags"] == ["llmtrain", "causal_lm"]
    assert "base_model" not in metadata("handed-on")
    assert "corpus.txt" in text and "# handed-on" in text and "sequence_length: 32" in text
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"| loss | {last['eval_loss']:.6g} |" in text and "| step | 3 |" in text
    assert re.search(r"llmtrain export .*/runs/tiny --output handed-on --dtype bfloat16", text)


def test_where_it_may_write(llmtrain: CommandLine, base: Path) -> None:
    Path("full").mkdir()
    Path("full/mine").touch()
    assert_refused(llmtrain("export", base, "--output", "full"), "--output: full is not an empty directory")
    Path("file").touch()
    assert_refused(llmtrain("export", base, "--output", "file"), "--output: file is not an empty directory")
    assert_refused(llmtrain("export", base, "--output", "file/below"), "--output: ")
    Path("empty").mkdir()
    assert llmtrain("export", base, "--output", "empty").code == 0
    assert len({path.stat().st_mode for path in Path("empty").iterdir()}) == 1  # the weights can be read as the rest
    assert_refused(llmtrain("export", "no/such/model", "--output", "new"), "no such directory: no/such/model")
    assert_refused(llmtrain("export", base, "--output", "new", "--base", base), "--base: ", "is a whole model")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(llmtrain: CommandLine, base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", base, "lora")
    assert os.path.getsize(base / "model.safetensors") > 60_000
    for arguments in ((base,), ("adapter",)):
        with files_of_at_most(50_000):
            done = llmtrain("export", *arguments, "--output", "out")
        assert_refused(done, "out could not be written", "remedy: make room", code=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
