"""The peer of the preference benchmarks: TRL's RewardTrainer or DPOTrainer on the same pairs.

usage: python -m tests.bench.preference_trl WORK KIND PRECISION STEPS WARMUP BATCH ACCUMULATION
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from llmtrain.observe.memory import peak_memory_bytes
from tests.bench.preference_data import ORDERED


class Clock(TrainerCallback):
    """When each optimizer step ended, and what was trained on until then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int, int]] = []
        self.losses: list[float] = []  # of the micro-batches of the first step
        self.pairs = self.tokens = 0

    def count(self, inputs: Any, loss: torch.Tensor) -> None:
        """A micro-batch: the better answers and then the worse ones, each behind its prompt."""
        self.pairs += len(inputs["input_ids"]) // 2
        self.tokens += int(inputs["attention_mask"].sum())
        if not self.ends:
            self.losses.append(loss.item())

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.ends.append((time.perf_counter(), self.pairs, self.tokens))


class CountingReward(RewardTrainer):
    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        self.clock.count(inputs, loss)
        return loss


class CountingDPO(DPOTrainer):
    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        self.clock.count(inputs, loss)
        return loss


def main(work: Path, kind: str, precision: str, steps: int, warmup: int, batch: int, accumulation: int) -> None:
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    # A cache of its own: DPOTrainer would find the reference's log-probabilities of the round before.
    with tempfile.TemporaryDirectory() as scratch:
        dataset = load_dataset("json", data_files=str(work / ORDERED), split="train", cache_dir=scratch)
        dataset = dataset.select(range(batch * accumulation * steps))
        settings = {
            "output_dir": scratch,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "train_sampling_strategy": "sequential",  # the pairs are in the other side's order
            "max_steps": steps,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "bf16": precision == "bf16_autocast",
            "gradient_checkpointing": False,
            "max_length": None,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = TRAINERS[kind](work / "model", settings, dataset, tokenizer, clock)
        trainer.clock = clock
        trainer.train()
    (began, pairs_before, tokens_before), (ended, pairs, tokens) = clock.ends[warmup - 1], clock.ends[-1]
    figures = {
        "pairs_per_second": (pairs - pairs_before) / (ended - began),
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        "first_loss": sum(clock.losses) / len(clock.losses),
        "pairs_per_step": (pairs - pairs_before) / (steps - warmup),
        "tokens_per_pair": (tokens - tokens_before) / (pairs - pairs_before),
    }
    print(json.dumps(figures))


def reward(model: Path, settings: dict[str, Any], dataset: Dataset, tokenizer: Any, clock: Clock) -> CountingReward:
    return CountingReward(
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
        args=RewardConfig(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
    )


def dpo(model: Path, settings: dict[str, Any], dataset: Dataset, tokenizer: Any, clock: Clock) -> CountingDPO:
    return CountingDPO(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=True),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
    )


TRAINERS = {"reward": reward, "dpo": dpo}

if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    work, kind, precision, *numbers = sys.argv[1:]
    main(Path(work), kind, precision, *(int(number) for number in numbers))
