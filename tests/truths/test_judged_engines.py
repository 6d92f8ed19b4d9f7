"""Learning from judged answers is the same whatever it runs on: ranks, micro-batches, backends, stops, layouts.

Real runs on ragged groups of answers; all figures and what was trained are compared.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmtrain.observe.metrics import read_metrics
from tests.backends import ENGINES, compare, slug
from tests.judged import ALGORITHMS, judged_recipe
from tests.runs import cut_after, train_here
from tests.together import train_together

LORA = "adapter={kind: lora, r: 4, target_modules: [q_proj, v_proj]}"
METHODS: dict[str, tuple[str, list[str]]] = {
    **{kind: (kind, []) for kind in ALGORITHMS},
    "reward_model, padded": ("reward_model, separate", ["data.packing=none", "data.group_by_length=true"]),
    "reward_model, lora": ("reward_model", [LORA]),
    "process_reward, lora": ("process_reward", [LORA]),
    "dpo, adapter off": ("dpo", [LORA, "algorithm.reference=adapter_off"]),
    "dpo, lora": ("dpo", [LORA]),
    "kto, adapter off": ("kto", [LORA, "algorithm.reference=adapter_off"]),
    "dpo, ema": ("dpo", ["ema.decay=0.9"]),
}
QUICK = {("reward_model", "fsdp"), ("process_reward", "ddp"), ("dpo", "zero3")}
# Margins and kl are differences, of scores or of log-probabilities of whole answers (up to 80 nats, which float32 holds
# to 4e-6, and whose mean over a batch it holds better).
LEAST = 3e-6
NO_EMA = {("dpo, ema", engine) for engine in ENGINES if engine.startswith("zero")}  # which the schema refuses


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


def recipe_of(directory: Path, method: str, name: str | None = None) -> tuple[Path, list[str]]:
    kind, settings = METHODS[method]
    # Adam divides a gradient near zero by itself, and so makes a step of its last bits; an eps tames that. At three
    # times this rate a reward model gets to where its gradient's norm differs by 1e-4 from one kind of CPU to another.
    optimizer = {"kind": "adamw", "lr": 3e-3, "eps": 1e-3}
    recipe = judged_recipe(directory, kind, optimizer=optimizer, batch={"sequences": 8, "micro_sequences": 4})
    path = directory / f"{slug(kind)}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, [*settings, f"name={slug(name or method)}"]


def check(directory: Path, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    reference, jobs = {}, []
    for method in dict.fromkeys(method for method, _ in pairs):
        recipe, settings = recipe_of(directory, method)
        reference[method] = train_here(recipe, f"output_dir={tmp_path / 'one'}", *settings)
    for method, engine in pairs:
        recipe, settings = recipe_of(directory, method)
        output = f"output_dir={tmp_path / engine}"
        jobs.append((recipe, [output, *settings, ENGINES[engine], "batch.micro_sequences=2"]))
    for (method, _), run in zip(pairs, train_together(jobs, ranks=2), strict=True):
        compare(run, reference[method], least=LEAST)


def test_backends_change_nothing(directory: Path, tmp_path: Path) -> None:
    check(directory, [pair for pair in sorted(QUICK) if pair[1] in ENGINES], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_backends_change_nothing_for_any_method(directory: Path, tmp_path: Path) -> None:
    every = {(method, engine) for method in METHODS for engine in ENGINES if engine in ("ddp", "fsdp", "zero3")}
    check(directory, sorted(every - QUICK - NO_EMA), tmp_path)


@pytest.mark.parametrize(
    "method",
    ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward_model, ranked", "process_reward"))],
)
def test_micro_batches_change_nothing(method: str, directory: Path, tmp_path: Path) -> None:
    recipe, settings = recipe_of(directory, method)
    whole = train_here(recipe, f"output_dir={tmp_path / 'whole'}", "batch.micro_sequences=8", *settings)
    ones = train_here(recipe, f"output_dir={tmp_path / 'ones'}", "batch.micro_sequences=1", *settings)
    compare(ones, whole, least=LEAST)


@pytest.mark.parametrize(
    "method", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "dpo, ema"))]
)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(method: str, directory: Path, tmp_path: Path) -> None:
    recipe, settings = recipe_of(directory, method)
    whole = train_here(recipe, f"output_dir={tmp_path}", *settings)
    cut_after(whole, 3, tmp_path / "again")
    resumed = train_here(recipe, f"output_dir={tmp_path / 'again'}", *settings)
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (resumed, whole))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_the_reference_is_computed_once_and_is_the_model_at_the_start(directory: Path, tmp_path: Path) -> None:
    recipe, settings = recipe_of(directory, "dpo, lora")
    cached = train_here(recipe, f"output_dir={tmp_path / 'cached'}", *settings)
    off = train_here(recipe, f"output_dir={tmp_path / 'off'}", *settings, "algorithm.reference=adapter_off")
    compare(off, cached, least=LEAST)
    assert (cached / "reference.safetensors").is_file() and not (off / "reference.safetensors").exists()
    first = next(iter(read_metrics(cached / "metrics.jsonl")))
    assert first["eval_loss"] == pytest.approx(0.6931472) and first["eval_margin"] == pytest.approx(0, abs=1e-6)


def test_the_scores_of_the_best_answers_are_zero_after_training(directory: Path, tmp_path: Path) -> None:
    recipe, settings = recipe_of(directory, "reward_model")
    run = train_here(recipe, f"output_dir={tmp_path}", *settings)
    *_, last = read_metrics(run / "metrics.jsonl")
    saved = json.loads((run / "final" / "reward.json").read_text())
    assert saved["bias"] == pytest.approx(last["eval_best_score"])
