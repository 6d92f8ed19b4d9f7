"""Distillation on two ranks of each backend equals one process: texts, losses, gradients and weights.

usage of a rank: python -m tests.truths.test_distillation_engines RECIPE.json RESULTS, under torchrun
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain import distributed, engines
from llmtrain.algorithms.distillation import Distilled, distilled
from llmtrain.algorithms.judged import Around
from llmtrain.contracts import POLICY, Engine
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.distributed import World
from llmtrain.models.hub import open_model, open_other_model
from llmtrain.models.peft import adapt
from llmtrain.recipe import schema
from llmtrain.recipe.batch import plan_batch
from tests import tiny
from tests.chats import sft_recipe

ROOT = Path(__file__).parents[2]
STEPS, LR = 2, 1e-2
ENGINES: dict[str, dict[str, Any]] = {"ddp": {"kind": "ddp"}, "fsdp": {"kind": "fsdp"}}
if importlib.util.find_spec("deepspeed") is not None:  # pip install -e '.[deepspeed]' brings it
    ENGINES |= {f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (2, 3)}
TEACHER = {"kind": "config", "architecture": "qwen3", "config": tiny.LLAMA | {"hidden_size": 48, "vocab_size": 420}}
# An adapter's student has a frozen head and frozen embeddings.
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "checkpointed": {"engine": {"activation_checkpointing": "full"}},
    "lora": {"adapter": {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"}},
}


def recipe_of(directory: Path, engine: dict[str, Any], variant: str, micro: int = 2) -> schema.Recipe:
    more = dict(VARIANTS[variant])
    fields = sft_recipe(
        directory,
        algorithm={"kind": "distillation", "teacher": TEACHER, "on_policy": 0.5, "max_new_tokens": 10, "beta": 0.5},
        batch={"sequences": 8, "micro_sequences": micro},
        engine={"timeout_seconds": 60, **engine, **more.pop("engine", {})},
        # Adam divides a gradient near zero by itself, and so makes a step of its last bits; an eps tames that.
        optimizer={"kind": "adamw", "lr": LR, "eps": 1e-3},
        **more,
    )
    return schema.Recipe.model_validate(fields)


def put_together(recipe: schema.Recipe, world: World) -> tuple[Engine, Distilled]:
    """As `llmtrain.run` does."""
    plan = plan_batch(recipe, world.size)
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    blueprint = open_model(recipe, tokenizer)
    if recipe.adapter is not None:
        adapt(blueprint, recipe, tokenizer)
    assert isinstance(recipe.algorithm, schema.Distillation)
    engine = engines.prepare(blueprint, recipe, world)
    teacher = engines.prepare_frozen(open_other_model(recipe.algorithm.teacher, recipe, tokenizer), recipe, world)
    datasets = prepare_data(recipe, tokenizer, cache)
    order = datasets.order(recipe.seed)
    loader = Loader(datasets.train, order, plan.sequences, plan.micro_sequences, world.rank, world.size)
    held_out = evaluation_batches(datasets.validation, 16, plan.micro_sequences, world.rank, world.size)
    template = datasets.documents.chat_template
    around = Around(engine, blueprint.decoder, world, Path(recipe.output_dir), nullcontext, teacher=teacher)
    made = distilled(recipe, plan, loader, held_out, tokenizer, template, around)
    return engine, made


def trained(recipe: schema.Recipe, world: World) -> dict[str, Tensor]:
    """Figures of some steps as the loop makes them, and the weights after them."""
    engine, made = put_together(recipe, world)
    figures: list[float] = []
    for step in range(STEPS):
        batch = made.micro_batches(step)
        written = sum(micro.weights[POLICY] for micro in batch if "targets" not in micro.tensors)
        counts = [sum(micro.weights[POLICY] for micro in batch), sum(micro.num_tokens for micro in batch), written]
        total, tokens, written = distributed.sum_scalars(counts)
        assert 0 < written < total, "a step has both kinds of rows"
        summed = 0.0
        for number, micro in enumerate(batch):
            with engine.accumulate(last=number == len(batch) - 1):
                loss = made.loss(engine.model, micro.to(engine.device)).sums[POLICY] / total
                engine.backward(loss)
            summed += loss.item()
        result = engine.step(LR)
        assert result.applied
        figures += [*distributed.sum_scalars([summed]), result.grad_norm, total, tokens, written]
    with engine.evaluating():
        figures += made.held_out.figures(engine.model, engine.device).values()
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in engine.full_parameters()}
    return {f"model.{name}": tensor for name, tensor in tensors.items()} | {"figures": torch.tensor(figures).double()}


def main(jobs: Path, results: Path) -> None:
    with distributed.joined("cpu", 60) as world:
        for name, fields in json.loads(jobs.read_text()).items():
            found = trained(schema.Recipe.model_validate(fields), world)
            if world.is_main:
                save_file(found, results / f"{name}.safetensors")


Job = tuple[str, str]  # engine, variant
EVERY_DAY: list[Job] = [(engine, "whole") for engine in ENGINES if engine != "zero2"]
OTHERS: list[Job] = [(e, v) for e in ENGINES for v in VARIANTS if (e, v) not in EVERY_DAY]
PRECISION = {"ddp": "bf16_autocast", "fsdp": "bf16_mixed", "zero2": "bf16_autocast", "zero3": "bf16_mixed"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distillation")


def on_two_ranks(directory: Path, recipes: dict[str, schema.Recipe]) -> dict[str, dict[str, Tensor]]:
    """Results of each recipe, by one set of processes: importing torch costs more than a tiny run."""
    jobs = directory / "jobs.json"
    jobs.write_text(json.dumps({name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [sys.executable, *launcher, "tests.truths.test_distillation_engines", str(jobs), str(directory)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: load_file(directory / f"{name}.safetensors") for name in recipes}


@pytest.fixture(scope="module")
def every_day(directory: Path) -> dict[str, dict[str, Tensor]]:
    return on_two_ranks(directory, {f"{e}-{v}": recipe_of(directory, ENGINES[e], v) for e, v in EVERY_DAY})


@pytest.fixture(scope="module")
def others(directory: Path) -> dict[str, dict[str, Tensor]]:
    recipes = {f"{e}-{v}": recipe_of(directory, ENGINES[e], v) for e, v in OTHERS}
    for engine, options in ENGINES.items():
        exact = recipe_of(directory, options, "whole")
        recipes[f"{engine}-bf16"] = exact.model_copy(update={"precision": PRECISION[engine]})
    return on_two_ranks(directory, recipes)


@pytest.fixture(scope="module")
def of_one(directory: Path) -> Callable[[str], dict[str, Tensor]]:
    """The same in one process, the whole batch in few forwards."""

    @cache
    def of_variant(variant: str) -> dict[str, Tensor]:
        return trained(recipe_of(directory, {"kind": "auto"}, variant, micro=8), tiny.ALONE)

    return of_variant


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Losses, gradient norms, tokens, held-out figures and weights."""
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["figures"], expected["figures"], rtol=2e-5, atol=0)
    for name, tensor in found.items():
        ours, theirs = tensor.double(), expected[name].double()
        difference = (ours - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert difference <= 4e-6 or name == "figures", f"{name}: {difference:.1e}"


@pytest.mark.parametrize("job", EVERY_DAY, ids="-".join)
def test_two_ranks_equal_one_process(job: Job, every_day: Any, of_one: Any) -> None:
    assert_the_same(every_day["-".join(job)], of_one(job[1]))


@pytest.mark.slow
@pytest.mark.parametrize("job", OTHERS, ids="-".join)
def test_so_do_adapters_and_recomputation(job: Job, others: Any, of_one: Any) -> None:
    assert_the_same(others["-".join(job)], of_one(job[1]))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_lower_precisions_train(engine: str, others: Any, of_one: Any) -> None:
    """What is sampled in bf16 may be other tokens: so the held-out divergence is what can be compared."""
    found, expected = others[f"{engine}-bf16"]["figures"], of_one("whole")["figures"]
    assert found[-4].item() == pytest.approx(expected[-4].item(), rel=2e-2)
    assert found.isfinite().all()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
