"""The peer of the sft benchmark: TRL's SFTTrainer on the same conversations.

usage: python -m tests.bench.sft_trl WORK_DIRECTORY METHOD PRECISION PACKING STEPS WARMUP
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llmtrain.observe.memory import peak_memory_bytes

SEQUENCE_LENGTH, ROWS_PER_STEP = 512, 4


class Clock(TrainerCallback):
    """When each optimizer step ended, and how many tokens were trained on until then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int]] = []
        self.tokens = 0

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.ends.append((time.perf_counter(), self.tokens))


class Counting(SFTTrainer):
    """Counts the tokens of each micro-batch that are no padding."""

    clock: Clock

    def training_step(self, model: Any, inputs: Any, *arguments: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.clock.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *arguments)


def main(work: Path, method: str, precision: str, packing: str, steps: int, warmup: int) -> None:
    dataset = load_dataset("json", data_files=str(work / "chats.jsonl"), split="train", cache_dir=str(work / "hf"))
    lengths = [len(str(row["messages"])) for row in dataset]
    # As many conversations a step as fill the packed rows, so that a step has about the same work.
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    average = sum(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in dataset) / len(lengths)
    conversations = max(1, round(SEQUENCE_LENGTH * ROWS_PER_STEP / min(average, SEQUENCE_LENGTH)))
    clock = Clock()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=ROWS_PER_STEP if packing == "packed" else conversations,
            max_steps=steps,
            learning_rate=2e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16_autocast",
            gradient_checkpointing=False,
            packing=packing == "packed",
            padding_free=packing != "padded",
            max_length=None if packing == "padding_free" else SEQUENCE_LENGTH,
            assistant_only_loss=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora if method == "lora" else None,
        callbacks=[clock],
    )
    trainer.clock = clock
    trainer.train()
    (began, before), (ended, after) = clock.ends[warmup - 1], clock.ends[-1]
    print(
        json.dumps(
            {
                "tokens_per_second": (after - before) / (ended - began),
                "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    work, method, precision, packing, steps, warmup = sys.argv[1:]
    main(Path(work), method, precision, packing, int(steps), int(warmup))
