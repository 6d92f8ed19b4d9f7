"""DeepSpeed's configuration from the recipe, and what a JSON of the user's own may say beside it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.errors import InputError
from llmtrain.recipe.deepspeed_json import check_deepspeed_json, deepspeed_config
from llmtrain.recipe.schema import Recipe
from tests.unit.recipe.minimal import MINIMAL

OPTIMIZER = {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 0.5}
AUTOCAST = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
SCHEDULE = {"kind": "cosine", "warmup_steps": 2, "min_ratio": 0.1}


def recipe(config: Path | None = None, **changes: Any) -> Recipe:
    engine = {"kind": "deepspeed", "zero_stage": 3} | changes.pop("engine", {})
    engine |= {} if config is None else {"config": str(config)}
    batch = {"sequences": 16, "micro_sequences": 2}
    sections = {"batch": batch, "optimizer": OPTIMIZER, "schedule": SCHEDULE, "steps": 10}
    return Recipe.model_validate(yaml.safe_load(MINIMAL) | sections | {"engine": engine} | changes)


def written(directory: Path, settings: Any) -> Path:
    file = directory / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return file


def config(of: Recipe, device: str = "cuda", hidden_size: int | None = None) -> dict[str, Any]:
    return deepspeed_config(of, world_size=4, device=device, hidden_size=hidden_size)


def complaint(directory: Path, settings: Any, world_size: int | None = 4, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        check_deepspeed_json(recipe(written(directory, settings), **changes), world_size)
    return str(error.value)


# ------------------------------------------------------------------------------------ from the recipe alone


def test_the_recipe_decides_what_is_trained() -> None:
    made = config(recipe(engine={"zero_stage": 2, "offload_optimizer": "cpu"}, precision="bf16_mixed"))
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in made["zero_optimization"]
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
    assert "fp16" not in made and "torch_autocast" not in made
    assert made["communication_data_type"] == "fp32"
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert made["managed_gradient_accumulation"] is False
    assert made["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in made and "scheduler" not in made


@pytest.mark.parametrize(
    ("precision", "engine", "section"),
    [
        ("fp32", {}, {}),
        ("bf16_autocast", {}, {"torch_autocast": AUTOCAST}),
        ("fp16_mixed", {}, {"fp16": {"enabled": True, "loss_scale": 0}}),
        ("fp16_mixed", {"loss_scale": 128.0}, {"fp16": {"enabled": True, "loss_scale": 128.0}}),
    ],
)
def test_precisions(precision: str, engine: dict[str, Any], section: dict[str, Any]) -> None:
    made = config(recipe(precision=precision, engine=engine))
    assert {key: made[key] for key in ("bf16", "fp16", "torch_autocast") if key in made} == section


def test_nvme_and_zero_plus_plus() -> None:
    plus = {"hpz_partition_size": 2, "quantized_weights": True, "quantized_gradients": True}
    engine = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/fast", "zero_plus_plus": plus}
    zero = config(recipe(engine=engine))["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "nvme", "nvme_path": "/fast"}
    assert zero["zero_hpz_partition_size"] == 2
    assert zero["zero_quantized_weights"] is zero["zero_quantized_gradients"] is True


def test_without_clipping() -> None:
    assert config(recipe(optimizer=OPTIMIZER | {"clip_norm": None}))["gradient_clipping"] == 0.0


def test_no_second_stream_on_a_cpu() -> None:
    assert config(recipe(), device="cpu")["zero_optimization"]["overlap_comm"] is False
    assert "overlap_comm" not in config(recipe(), device="cuda")["zero_optimization"]


# ------------------------------------------------------------------------------------------ the user's file


def test_further_settings_are_passed_on(tmp_path: Path) -> None:
    zero = {"stage3_prefetch_bucket_size": 1000, "overlap_comm": True, "offload_optimizer": {"pin_memory": False}}
    file = written(tmp_path, {"zero_optimization": zero, "wall_clock_breakdown": True, "aio": {"thread_count": 2}})
    made = config(recipe(file, engine={"offload_optimizer": "cpu"}), device="cpu")
    assert made["zero_optimization"] == zero | {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "use_multi_rank_bucket_allreduce": False,  # ours: gradients go to their owner only
    }
    assert made["wall_clock_breakdown"] is True
    assert made["aio"] == {"thread_count": 2}


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_file_for_hugging_face_serves_as_it_is(tmp_path: Path) -> None:
    made = config(recipe(written(tmp_path, HUGGING_FACE), precision="bf16_mixed"), hidden_size=100)
    zero = made["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert made["fp16"] == {"initial_scale_power": 12}
    assert made["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(made)
    assert "reduce_bucket_size" not in config(recipe(written(tmp_path, HUGGING_FACE)))["zero_optimization"]


def test_the_same_values_may_be_repeated(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.98], "eps": 1e-8}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 10}},
    }
    check_deepspeed_json(recipe(written(tmp_path, settings), precision="bf16_mixed"), 4)


@pytest.mark.parametrize(
    ("settings", "key", "ours", "theirs"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "2", "engine.zero_stage: 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "true", "engine.zero_stage: 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "1.0", "optimizer.clip_norm: 0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "true", 'precision: "fp32"'),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "true", 'precision: "fp32"'),
        ({"train_batch_size": 32}, "train_batch_size", "32", "the recipe's 16 rows (batch.sequences)"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", "4", "the recipe's 2 ("),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", "8", "over 4 ranks"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            '"cpu"',
            'engine.offload_optimizer: "none"',
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
            "true",
            "engine.zero_plus_plus.quantized_weights: false",
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", '"Lamb"', 'optimizer.kind: "adamw"'),
        ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr", "0.0003", "optimizer.lr: 0.001"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", '"OneCycle"', 'schedule.kind: "cosine"'),
        ({"communication_data_type": "bf16"}, "communication_data_type", '"bf16"', 'llmtrain, which needs "fp32"'),
    ],
)
def test_a_contradiction_names_both_values_and_both_places(
    tmp_path: Path, settings: dict[str, Any], key: str, ours: str, theirs: str
) -> None:
    text = complaint(tmp_path, settings)
    assert text.startswith(f"{tmp_path / 'ds.json'}: {key}: {ours} contradicts ")
    assert theirs in text


def test_all_that_is_wrong_is_said_together(tmp_path: Path) -> None:
    text = complaint(tmp_path, {"zero_optimization": {"stage": 1}, "gradient_clipping": 7, "amp": {}})
    assert all(key in text for key in ("3 mistakes", "zero_optimization.stage", "gradient_clipping", "amp"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "did you mean 'device'?"),
        ({"zero_optimization": 3}, "expected a section {...}, got 3"),
        ({"activation_checkpointing": {"partition_activations": True}}, "engine.activation_checkpointing"),
        ({"zero_optimization": {"cpu_offload": True}}, "engine.offload_optimizer"),
        ({"curriculum_learning": {}}, "not among the settings"),
        ("[1]", "is a JSON object"),
        ('{"bf16": {},\n "fp16": }', "ds.json:2: no JSON: Expecting value"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' stands twice"),
        ('{"steps_per_print": NaN}', "NaN is no JSON number"),
    ],
)
def test_what_is_no_deepspeed_configuration(tmp_path: Path, settings: Any, text: str) -> None:
    assert text in complaint(tmp_path, settings)


def test_overlap_is_for_stages_2_and_3(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"overlap_comm": True}}
    assert "overlap_comm: true contradicts" in complaint(tmp_path, settings, engine={"zero_stage": 1})
    check_deepspeed_json(recipe(written(tmp_path, settings), engine={"zero_stage": 2}), 4)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^engine.config: .*none.json cannot be read: No such file"):
        check_deepspeed_json(recipe(tmp_path / "none.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"bytes.json is not UTF-8 text"):
        check_deepspeed_json(recipe(tmp_path / "bytes.json"))


def test_sizes_of_ranks_are_compared_once_they_are_known(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 7}
    check_deepspeed_json(recipe(written(tmp_path, settings)), None)
    assert "gradient_accumulation_steps: 7" in complaint(tmp_path, settings, world_size=4)


def test_importing_it_costs_no_torch() -> None:
    code = "import sys, llmtrain.recipe.deepspeed_json; sys.exit(bool({'torch', 'deepspeed'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
