"""The peer of the pretrain benchmark: TRL's SFTTrainer on rows that are packed already.

usage: python -m tests.bench.pretrain_trl WORK_DIRECTORY PRECISION STEPS WARMUP BATCH ACCUMULATION COMPILE
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llmtrain.observe.memory import peak_memory_bytes


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.ends.append(time.perf_counter())


def main(work: Path, precision: str, steps: int, warmup: int, batch: int, accumulation: int, compiled: bool) -> None:
    rows = np.load(work / "rows.npz")
    lengths = [row[row > 0].tolist() for row in rows["segment_lengths"]]
    dataset = Dataset.from_dict({"input_ids": rows["input_ids"].tolist(), "seq_lengths": lengths})
    config = AutoConfig.from_pretrained(work / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16_autocast",
            gradient_checkpointing=False,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            torch_compile=compiled,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        callbacks=[clock],
    )
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[warmup - 1]
    tokens = rows["input_ids"].shape[1] * batch * accumulation * (steps - warmup)
    print(
        json.dumps({"tokens_per_second": tokens / seconds, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))})
    )


if __name__ == "__main__":
    work, precision, *numbers = sys.argv[1:]
    steps, warmup, batch, accumulation, compiled = map(int, numbers)
    main(Path(work), precision, steps, warmup, batch, accumulation, bool(compiled))
