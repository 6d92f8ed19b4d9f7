"""Fine-tuning is the same whatever it runs on: ranks, micro-batches, backends, stops.

Real runs on ragged conversations, whole and with adapters; what an adapter trains is compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.backends import ENGINES, compare, slug
from tests.chats import sft_recipe
from tests.runs import cut_after, train_here
from tests.together import train_together

METHODS: dict[str, list[str]] = {
    "full, packed": [],
    "full, padded": ["data.packing=none", "data.group_by_length=true"],
    "dft, split": ["algorithm.loss=dft", "data.overflow=split", "sequence_length=64"],
    "lora": ["adapter={kind: lora, r: 4}", "optimizer.groups=[{names: '*lora_B*', lr_ratio: 4.0}]"],
    "dora": ["adapter={kind: lora, r: 4, dora: true}"],
    "ia3": ["adapter={kind: ia3}"],
    "prompt_tuning": ["adapter={kind: prompt_tuning, num_virtual_tokens: 4}"],
    "prefix_tuning": ["adapter={kind: prefix_tuning, num_virtual_tokens: 4}", "data.packing=none"],
    "p_tuning": ["adapter={kind: p_tuning, num_virtual_tokens: 4}"],
}
QUICK = {("full, packed", "fsdp"), ("full, padded", "ddp"), ("lora", "zero3")}
FIGURES = ("loss", "grad_norm", "eval_loss", "tokens", "lr")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sft")
    optimizer = {"lr": 1e-2, "eps": 1e-4}  # see test_engines.py
    path = directory / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(sft_recipe(directory, optimizer=optimizer, batch={"sequences": 8, "micro_sequences": 2}))
    )
    return path


def check(recipe: Path, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    reference, jobs = {}, []
    for method in dict.fromkeys(method for method, _ in pairs):
        reference[method] = train_here(
            recipe, f"output_dir={tmp_path / 'one'}", f"name={slug(method)}", *METHODS[method]
        )
    for method, engine in pairs:
        where = [f"output_dir={tmp_path / engine}", f"name={slug(method)}"]
        jobs.append((recipe, [*where, *METHODS[method], ENGINES[engine]]))
    for (method, _), run in zip(pairs, train_together(jobs, ranks=2), strict=True):
        compare(run, reference[method], FIGURES)


def test_backends_change_nothing(recipe: Path, tmp_path: Path) -> None:
    check(recipe, [pair for pair in sorted(QUICK) if pair[1] in ENGINES], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_backends_change_nothing_for_any_method(recipe: Path, tmp_path: Path) -> None:
    check(
        recipe,
        [(method, engine) for method in METHODS for engine in ENGINES if (method, engine) not in QUICK],
        tmp_path,
    )


@pytest.mark.parametrize("method", ["full, padded", "lora"])
def test_micro_batches_change_nothing(method: str, recipe: Path, tmp_path: Path) -> None:
    settings = METHODS[method]
    whole = train_here(recipe, f"output_dir={tmp_path / 'whole'}", "batch.micro_sequences=8", *settings)
    compare(train_here(recipe, f"output_dir={tmp_path / 'ones'}", "batch.micro_sequences=1", *settings), whole, FIGURES)


@pytest.mark.parametrize("method", ["full, padded", "lora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(method: str, recipe: Path, tmp_path: Path) -> None:
    noise: list[Any] = ["algorithm.neftune_alpha=5"]  # drawn from generators, whose state the checkpoints hold
    settings = [*METHODS[method], *noise]
    whole = train_here(recipe, f"output_dir={tmp_path}", *settings)
    cut_after(whole, 3, tmp_path / "again")
    resumed = train_here(recipe, f"output_dir={tmp_path / 'again'}", *settings)
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours, theirs = load_file(resumed / "final" / file), load_file(whole / "final" / file)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_an_adapter_knows_its_base_from_anywhere(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    run = train_here(recipe, f"output_dir={tmp_path}", "steps=2", "model.path=./model", "adapter={kind: lora, r: 2}")
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((recipe.parent / "model").resolve())
