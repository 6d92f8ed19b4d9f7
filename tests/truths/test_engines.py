"""The backend is one line of the recipe, and nothing else changes: not what is learnt, not a checkpoint's meaning.

Real runs of the tiny recipe with ragged documents, accumulation, clipping and decay; many of them
in one set of processes (`tests/together.py`).
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmtrain.observe.metrics import read_metrics
from tests.runs import cut_after, final_weights, train_here, training_state, write_recipe
from tests.together import train_together

ZERO = "engine={kind: deepspeed, zero_stage: %d}"
ENGINES = {
    "ddp x2": (2, ["engine.kind=ddp"]),
    "fsdp x2": (2, ["engine.kind=fsdp"]),
    "fsdp x2, kept after forward": (2, ["engine={kind: fsdp, reshard_after_forward: false}"]),
    "fsdp x2, offloaded": (2, ["engine={kind: fsdp, cpu_offload: true}"]),
    "fsdp x2, recomputed": (2, ["engine={kind: fsdp, activation_checkpointing: full}"]),
    "fsdp x4 (2 x 2)": (4, ["engine={kind: fsdp, shard_size: 2}"]),
    "zero0 x2": (2, [ZERO % 0]),
    "zero1 x2": (2, [ZERO % 1]),
    "zero2 x2": (2, [ZERO % 2]),
    "zero3 x2": (2, [ZERO % 3]),
    "zero3 x2, offloaded": (
        2,
        ["engine={kind: deepspeed, zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"],
    ),
}
if importlib.util.find_spec("deepspeed") is None:  # pip install -e '.[deepspeed]' brings it
    ENGINES = {name: engine for name, engine in ENGINES.items() if not name.startswith("zero")}
EVERY_DAY = [name for name in ("ddp x2", "fsdp x2", "zero3 x2") if name in ENGINES]
OTHERS = [name for name in ENGINES if name not in EVERY_DAY]

STEPS = 6
SETTINGS = {
    "batch": {"sequences": 8, "micro_sequences": 1},  # two micro-batches at least on every rank
    # Adam divides a gradient near zero by itself, and so makes a step of its last bits; an eps tames that.
    "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-4},
}
FIGURES = ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "tokens", "skipped", "lr")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("engines"), steps=STEPS, **SETTINGS)


@pytest.fixture(scope="module")
def single(recipe: Path) -> Path:
    return train_here(recipe)


@pytest.fixture(scope="module")
def daily_runs(recipe: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The whole run on the engines of every day."""
    return {"single": single} | whole_runs(recipe, EVERY_DAY, tmp_path_factory.mktemp("daily"))


@pytest.fixture(scope="module")
def runs(recipe: Path, daily_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The whole run on every engine."""
    return daily_runs | whole_runs(recipe, OTHERS, tmp_path_factory.mktemp("others"))


def whole_runs(recipe: Path, engines: Sequence[str], output: Path) -> dict[str, Path]:
    return train_all(recipe, {name: [*ENGINES[name][1], f"output_dir={output / name}"] for name in engines})


def train_all(recipe: Path, jobs: dict[str, Sequence[str]], engine_of: dict[str, str] | None = None) -> dict[str, Path]:
    """Each job on the ranks of its engine, those of the same number together."""
    done: dict[str, Path] = {}
    ranks_of = {job: ENGINES[(engine_of or {}).get(job, job)][0] for job in jobs}
    for ranks in sorted(set(ranks_of.values())):
        names = [job for job in jobs if ranks_of[job] == ranks]
        done |= dict(zip(names, train_together([(recipe, jobs[name]) for name in names], ranks), strict=True))
    return done


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    worst = max((relative_difference(a[name], b[name]), name) for name in a)
    assert worst[0] <= tolerance, worst


@pytest.mark.parametrize("engine", EVERY_DAY)
def test_the_engine_changes_nothing(engine: str, daily_runs: dict[str, Path]) -> None:
    assert_the_same_run(daily_runs[engine], daily_runs["single"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", OTHERS)
def test_no_engine_changes_anything(engine: str, runs: dict[str, Path]) -> None:
    assert_the_same_run(runs[engine], runs["single"])


def assert_the_same_run(run: Path, single: Path) -> None:
    """Relative to each parameter's norm; the first moments, too, and the figures of every step."""
    assert_close(final_weights(run), final_weights(single), 1e-6)
    ours, theirs = training_state(run, STEPS), training_state(single, STEPS)
    assert_close(ours, theirs, 2e-5)
    for record, expected in zip(
        read_metrics(run / "metrics.jsonl"), read_metrics(single / "metrics.jsonl"), strict=True
    ):
        assert record.keys() == expected.keys()
        for figure in [figure for figure in FIGURES if figure in expected]:
            assert record[figure] == pytest.approx(expected[figure], rel=1e-5), (record["step"], figure)


SOURCES = ("single", "ddp x2", "fsdp x2", "zero2 x2", "zero3 x2", "fsdp x4 (2 x 2)")
TARGETS = ("ddp x2", "fsdp x2", "zero1 x2", "zero2 x2", "zero3 x2", "fsdp x4 (2 x 2)")
PAIRS = [(a, b) for a in SOURCES for b in TARGETS if {a, b} <= {"single", *ENGINES}]


@pytest.fixture(scope="module")
def resumed(recipe: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pair: the first three steps on one engine, the others on another."""
    output = tmp_path_factory.mktemp("resumed")
    jobs: dict[str, Sequence[str]] = {}
    engine_of = {}
    for source, target in PAIRS:
        name = f"{source} to {target}"
        cut_after(runs[source], 3, output / name)
        jobs[name] = [*ENGINES[target][1], f"output_dir={output / name}"]
        engine_of[name] = target
    return train_all(recipe, jobs, engine_of)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_goes_on_on_another_engine(
    source: str, target: str, runs: dict[str, Path], resumed: dict[str, Path]
) -> None:
    run = resumed[f"{source} to {target}"]
    if source == target:
        exact = training_state(run, STEPS), training_state(runs[source], STEPS)
        assert exact[0].keys() == exact[1].keys()
        for name in exact[0]:
            assert torch.equal(exact[0][name], exact[1][name]), name
    assert_close(final_weights(run), final_weights(runs["single"]), 1e-5)
    records = list(read_metrics(run / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record, expected in zip(records, read_metrics(runs["single"] / "metrics.jsonl"), strict=True):
        assert record["loss" if record["step"] else "eval_loss"] == pytest.approx(
            expected["loss" if record["step"] else "eval_loss"], rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_one_process_goes_on(source: str, recipe: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    if source not in runs:
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]'")
    cut_after(runs[source], 3, tmp_path)
    run = train_here(recipe, f"output_dir={tmp_path}")
    assert_close(final_weights(run), final_weights(runs["single"]), 1e-5)
