"""A plain DeepSpeed user, in a process of its own: loads a universal checkpoint and trains on with a run's own data.

Usage: universal_case.py RECIPE RUN UNIVERSAL STAGE RESULT. Nothing of llmtrain's engines or checkpoints is used.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import Recipe
from llmtrain.schedule import learning_rate


def loaded_engine(recipe: Recipe, run: Path, universal: Path, stage: int) -> Any:
    torch.manual_seed(99)  # other weights than the checkpoint's
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "final"), dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    # One step counter serves all groups of stage 3, and torch's AdamW then counts it once for each.
    groups = [{"params": [*matrices, *vectors]}] if stage == 3 else [{"params": matrices}, {"params": vectors}]
    spec = recipe.optimizer
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, weight_decay=spec.weight_decay
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    path, _ = engine.load_checkpoint(str(universal))
    assert path is not None
    return engine


def nll(engine: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    logits = engine(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten(), reduction="sum")


def main(recipe_file: Path, run: Path, universal: Path, stage: int, result: Path) -> None:
    recipe = load_recipe(recipe_file).recipe
    cache = cache_directory(recipe.data.cache_dir)
    datasets = prepare_data(recipe, prepare_tokenizer(recipe, cache).tokenizer, cache)
    loader = Loader(datasets.train, datasets.order(recipe.seed), 8, 8, 0, 1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    engine = loaded_engine(recipe, run, universal, stage)
    state = {f"loaded.{name}": tensor for name, tensor in whole(engine).items()}
    assert recipe.steps is not None
    print(json.dumps({"step": engine.global_steps}))
    for step in range(engine.global_steps, recipe.steps):
        (micro,) = loader.micro_batches(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.schedule, recipe.optimizer.lr, step + 1, recipe.steps)
        engine.backward(nll(engine, micro.tensors) / int((micro.tensors["targets"] >= 0).sum()))
        engine.step()
    save_file(state | {f"trained.{name}": tensor for name, tensor in whole(engine).items()}, result)


def whole(engine: Any) -> dict[str, Tensor]:
    """Weights and moments by the names of our checkpoints, flattened."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        state[f"policy/model.hf.{name}"] = safe_get_full_fp32_param(parameter).flatten().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, moment)
            state[f"policy/optimizer.hf.{name}.{moment}"] = value.flatten().clone()
    return state


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe_path, run_path, universal_path, stage_text, result_path = sys.argv[1:]
    main(Path(recipe_path), Path(run_path), Path(universal_path), int(stage_text), Path(result_path))
