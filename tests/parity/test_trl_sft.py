"""Fine-tuning against TRL's SFTTrainer: the same conversations give the same tokens, loss and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain import engines
from llmtrain.algorithms.sft import LOSSES
from llmtrain.algorithms.texts import HeldOut, Supervised, TextSamples
from llmtrain.contracts import POLICY, Engine, MicroBatch
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader
from llmtrain.models.hub import open_model
from llmtrain.models.peft import adapt
from llmtrain.recipe import schema
from tests.chats import sft_recipe
from tests.tiny import ALONE

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]'")

ROWS = 4
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}


def our_side(directory: Path, **overrides: Any) -> tuple[Engine, Supervised, MicroBatch, schema.Recipe]:
    """Engine, algorithm and the first micro-batch of `ROWS` conversations, one a row."""
    data = sft_recipe(directory)["data"] | {"packing": "none"}
    batch = {"sequences": ROWS, "micro_sequences": ROWS}
    recipe = schema.Recipe.model_validate(sft_recipe(directory, data=data, batch=batch, **overrides))
    assert isinstance(recipe.algorithm, schema.SFT)
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache)
    loader = Loader(datasets.train, datasets.order(recipe.seed), ROWS, ROWS, rank=0, world_size=1)
    samples = TextSamples(None, tokenizer, 64, 0, datasets.documents.prompt_ids)
    algorithm = Supervised(LOSSES[recipe.algorithm.loss], loader.micro_batches, HeldOut([], 0), samples, {})
    blueprint = open_model(recipe, tokenizer)
    adapt(blueprint, recipe, tokenizer)
    (micro,) = next(algorithm.step_batches(0))
    return engines.prepare(blueprint, recipe, ALONE), algorithm, micro, recipe


def their_side(directory: Path, micro: MicroBatch, loss: str, lora: dict[str, Any] | None) -> Any:
    """TRL's trainer on the conversations of our micro-batch, in the same order."""
    import json

    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from llmtrain.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(directory / "model"))
    rows = [json.loads(line) for line in (directory / "chats.jsonl").read_text().splitlines()]
    by_ids = {}
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"])["input_ids"][:96]
        by_ids[tuple(ids)] = row
    chosen = []
    for ids, documents in zip(micro.tensors["input_ids"], micro.tensors["document_ids"], strict=True):
        chosen.append(by_ids[tuple(ids[documents >= 0].tolist())])
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=ROWS,
            max_length=96,
            assistant_only_loss=True,
            loss_type=loss,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(chosen),
        processing_class=tokenizer,
        peft_config=None if lora is None else LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


def gradients(model: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(("loss", "lora"), [("nll", None), ("dft", None), ("nll", LORA)])
def test_same_tokens_loss_and_gradients(loss: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {} if lora is None else {"adapter": {"kind": "lora", **lora}}
    engine, algorithm, micro, _ = our_side(tmp_path, algorithm={"kind": "sft", "loss": loss}, **overrides)
    trainer = their_side(tmp_path, micro, loss, lora)
    theirs = trainer.data_collator([trainer.train_dataset[number] for number in range(ROWS)])

    ours = torch.full_like(theirs["labels"], -100)
    targets = micro.tensors["targets"]
    width = min(ours.shape[1], targets.shape[1] + 1)
    ours[:, 1:width] = targets[:, : width - 1]
    assert torch.equal(ours, theirs["labels"])

    model = trainer.model.train()
    if lora is not None:  # ours begins from other random numbers, so both begin from TRL's, with a B that is not zero
        torch.manual_seed(1)
        their_parameters = {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        our_parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        assert {f"hf.{name}" for name in their_parameters} == our_parameters.keys()
        assert sum(p.numel() for p in their_parameters.values()) == sum(p.numel() for p in our_parameters.values())
        with torch.no_grad():
            for name, parameter in their_parameters.items():
                parameter.normal_(std=0.05)
                our_parameters[f"hf.{name}"].copy_(parameter)

    count = (theirs["labels"][:, 1:] != -100).sum()
    their_loss = trainer.compute_loss(model, dict(theirs), num_items_in_batch=count)
    their_loss.backward()
    with engine.accumulate(True):
        total = algorithm.loss({POLICY: engine.model}, micro).sums[POLICY] / micro.weights[POLICY]
    engine.backward(total)
    torch.testing.assert_close(total.detach(), their_loss.detach(), rtol=1e-5, atol=0)
    expected = gradients(model, "base_model.model.")
    found = gradients(engine.model, "hf.")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
