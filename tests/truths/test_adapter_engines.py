"""With an adapter, too, the backend changes nothing: real runs, their checkpoints and what they export."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.observe.metrics import read_metrics
from tests import adapters
from tests.runs import TEXT, assert_same, train_here, training_state, write_recipe
from tests.together import train_together

ENGINES = {"ddp": "engine.kind=ddp", "fsdp": "engine.kind=fsdp"}
if importlib.util.find_spec("deepspeed") is not None:  # pip install -e '.[deepspeed]' brings it
    ENGINES |= {f"zero{stage}": f"engine={{kind: deepspeed, zero_stage: {stage}}}" for stage in (1, 2, 3)}
ADAPTERS: dict[str, dict[str, Any]] = {
    # It reads the frozen weights, changes them, and is counted from the unchanged ones when it is exported.
    "lora": adapters.LORA | {"dora": True, "init": "pissa"},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 4},
    # On a tied model that is new to the mask token, whose row is trained beside the matrices.
    "mask_row": adapters.LORA,
}
OF_ADAPTERS = ("lora_", "prompt.", "trainable_tokens_delta")  # in names of parameters
STEPS = 6

pytestmark = pytest.mark.slow  # tests/truths/test_sft.py has some of it for every day


def recipe(directory: Path, name: str) -> Path:
    """An adapter on a pretrained model, whose tokenizer knows the words of the corpus."""
    masked = name == "mask_row"
    base = adapters.pretrained(directory / "base", max_position_embeddings=64, tie_word_embeddings=masked)
    groups = [{"names": "*lora_B*", "lr_ratio": 2}] if name == "lora" else []
    path = write_recipe(
        directory,
        steps=STEPS,
        model={"kind": "pretrained", "path": str(base)},
        tokenizer={"kind": "model"},
        adapter=ADAPTERS[name],
        batch={"sequences": 8, "micro_sequences": 1},
        optimizer={"kind": "adamw", "lr": 1e-2, "eps": 1e-4, "groups": groups},
        algorithm={"kind": "masked_diffusion" if masked else "causal_lm"},
    )
    corpus = directory / "corpus.txt"
    words = {word: f"w{number}" for number, word in enumerate(sorted(set(TEXT.split())), start=3)}
    lines = corpus.read_text().splitlines()
    corpus.write_text("".join(f"{' '.join(words[word] for word in line.split())}\n" for line in lines))
    return path


class Runs(NamedTuple):
    recipe: Path
    single: Path
    of: dict[str, Path]


def runs_of(name: str, directory: Path) -> Runs:
    path = recipe(directory, name)
    jobs = {engine: (path, [option, f"output_dir={directory / engine}"]) for engine, option in ENGINES.items()}
    return Runs(path, train_here(path), dict(zip(jobs, train_together(list(jobs.values()), 2), strict=True)))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_of("lora", tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def p_tuning(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_of("p_tuning", tmp_path_factory.mktemp("p_tuning"))


@pytest.fixture(scope="module")
def mask_row(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_of("mask_row", tmp_path_factory.mktemp("mask_row"))


def exported(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor.double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


def assert_the_engine_changes_nothing(run: Path, single: Path) -> None:
    assert_close(exported(run), exported(single), 2e-6)
    state = training_state(run, STEPS)
    assert_close(state, training_state(single, STEPS), 2e-5)
    of_parameters = {name for name in state if name.startswith("policy/model.")}
    assert of_parameters and all(any(kind in name for kind in OF_ADAPTERS) for name in of_parameters)
    for ours, theirs in zip(read_metrics(run / "metrics.jsonl"), read_metrics(single / "metrics.jsonl"), strict=True):
        for figure in {"loss", "grad_norm", "eval_loss"} & theirs.keys():
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-5), (ours["step"], figure)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_changes_nothing_for_lora(engine: str, lora: Runs) -> None:
    assert_the_engine_changes_nothing(lora.of[engine], lora.single)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_changes_nothing_for_a_prompt(engine: str, p_tuning: Runs) -> None:
    assert_the_engine_changes_nothing(p_tuning.of[engine], p_tuning.single)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_changes_nothing_for_the_row_of_a_mask(engine: str, mask_row: Runs) -> None:
    assert any("trainable_tokens_delta" in name for name in exported(mask_row.single))
    assert_the_engine_changes_nothing(mask_row.of[engine], mask_row.single)


def gone_on(run: Path, runs: Runs, directory: Path) -> Path:
    """The last steps once more, in one process, from the checkpoint that `run` saved half way."""
    copy = directory / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    assert train_here(runs.recipe, f"output_dir={directory}") == copy
    return copy


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_on_another_engine(engine: str, lora: Runs, tmp_path: Path) -> None:
    assert_close(exported(gone_on(lora.of[engine], lora, tmp_path)), exported(lora.single), 1e-5)


def test_a_run_that_is_resumed_is_the_same(lora: Runs, tmp_path: Path) -> None:
    assert_same(exported(gone_on(lora.single, lora, tmp_path)), exported(lora.single))
