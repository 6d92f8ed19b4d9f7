"""Diffusion, too, is the same on every backend and for any micro-batch, and resumes bit for bit."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.models.diffusion import Diffusion, load_diffusion
from llmtrain.observe.metrics import read_metrics
from tests.runs import assert_same, cut_after, final_weights, train_here, training_state, write_recipe
from tests.together import train_together

STEPS = 6
ALGORITHMS: dict[str, dict[str, Any]] = {
    "masked": {"kind": "masked_diffusion", "shift": True},
    "block": {"kind": "block_diffusion", "block_size": 4},
    "absorbing": {"kind": "score_entropy"},
    "uniform": {"kind": "score_entropy", "noise": "uniform"},
    "masked, complementary, annealed, cropped": {
        "kind": "masked_diffusion",
        "complementary": True,
        "annealing_steps": 8,
        "random_length_share": 0.3,
    },
    "block, shifted, clipped, by sequences": {
        "kind": "block_diffusion",
        "block_size": 8,
        "curriculum": [{"from_step": 0, "block_size": 1}, {"from_step": 3, "block_size": 8}],
        "shift": True,
        "clip": [0.3, 0.8],
        "normalization": "sequences",
    },
    "block, searched": {
        "kind": "block_diffusion",
        "block_size": 8,
        "clip": "search",
        "curriculum": [
            {"from_step": 0, "block_size": 2},
            {"from_step": 2, "block_size": 4},
            {"from_step": 4, "block_size": 8},
        ],
    },
}
ENGINES = {"ddp": "engine.kind=ddp", "fsdp": "engine.kind=fsdp"}
if importlib.util.find_spec("deepspeed") is not None:  # pip install -e '.[deepspeed]' brings it
    ENGINES |= {f"zero{stage}": f"engine={{kind: deepspeed, zero_stage: {stage}}}" for stage in (1, 3)}
RANKS = 2
FIGURES = {"loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "eval_clip_low", "eval_clip_high", "tokens", "lr"}

Job = tuple[str, str, int]  # algorithm, engine, micro-batch
EVERY: list[Job] = [(algorithm, engine, micro) for algorithm in ALGORITHMS for engine in ENGINES for micro in (1, 4)]
EVERY_DAY = [job for job in EVERY if job in (("masked", "fsdp", 1), ("block", "zero3", 4))]


def recipe_of(directory: Path, algorithm: str, **overrides: Any) -> Path:
    target = directory / algorithm.replace(", ", "-")
    target.mkdir(parents=True)
    # Adam divides a gradient near zero by itself, and so makes a step of its last bits; an eps tames that.
    optimizer = {"kind": "adamw", "lr": 1e-2, "eps": 1e-3}
    return write_recipe(target, steps=STEPS, optimizer=optimizer, algorithm=ALGORITHMS[algorithm], **overrides)


class Runs:
    """Runs of one process, and of several ranks, in a directory; each is made once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._recipes: dict[str, Path] = {}
        self._single: dict[str, Path] = {}
        self._made: dict[Job, Path] = {}

    def recipe(self, algorithm: str) -> Path:
        if algorithm not in self._recipes:
            self._recipes[algorithm] = recipe_of(self._directory, algorithm)
        return self._recipes[algorithm]

    def single(self, algorithm: str) -> Path:
        """One process, the whole batch in one forward."""
        if algorithm not in self._single:
            self._single[algorithm] = train_here(self.recipe(algorithm))
        return self._single[algorithm]

    def make(self, jobs: Iterable[Job]) -> None:
        wanted = [job for job in jobs if job not in self._made]
        asked = []
        for algorithm, engine, micro in wanted:
            output = self._directory / f"{algorithm} {engine} {micro}".replace(", ", "-")
            overrides = [ENGINES[engine], f"batch.micro_sequences={micro}", f"output_dir={output}"]
            asked.append((self.recipe(algorithm), overrides))
        self._made |= dict(zip(wanted, train_together(asked, RANKS), strict=True))

    def apart(self, asked: Iterable[tuple[str, list[str]]]) -> list[Path]:
        """Further runs, one after another, each of an algorithm with settings of its own."""
        jobs = [
            (self.recipe(algorithm), [*overrides, f"output_dir={self._directory / 'apart' / str(number)}"])
            for number, (algorithm, overrides) in enumerate(asked)
        ]
        return train_together(jobs, RANKS)

    def __getitem__(self, job: Job) -> Path:
        return self._made[job]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("engines"))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor.double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


def assert_the_same_run(run: Path, single: Path) -> None:
    assert_close(final_weights(run), final_weights(single), 4e-6)
    assert_close(training_state(run, STEPS), training_state(single, STEPS), 5e-5)
    records = [list(read_metrics(path / "metrics.jsonl")) for path in (run, single)]
    for ours, theirs in zip(*records, strict=True):
        assert ours.keys() == theirs.keys()
        for figure in FIGURES & theirs.keys():
            assert ours[figure] == pytest.approx(theirs[figure], rel=2e-5), (ours["step"], figure)
    assert records[0][-1]["eval_loss"] < records[0][0]["eval_loss"] and records[0][-1]["skipped"] == 0


@pytest.mark.parametrize("job", EVERY_DAY, ids=lambda job: f"{job[0]} {job[1]} {job[2]}")
def test_the_backend_changes_nothing(job: Job, runs: Runs) -> None:
    runs.make(EVERY_DAY)
    assert_the_same_run(runs[job], runs.single(job[0]))


@pytest.mark.slow
@pytest.mark.parametrize("job", EVERY, ids=lambda job: f"{job[0]} {job[1]} {job[2]}")
def test_no_backend_changes_anything(job: Job, runs: Runs) -> None:
    runs.make(EVERY)
    assert_the_same_run(runs[job], runs.single(job[0]))


@pytest.mark.parametrize(
    "algorithm",
    ["masked", "block", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if "," in name)],
)
def test_the_micro_batch_changes_nothing(algorithm: str, runs: Runs, tmp_path: Path) -> None:
    """Also where rows are padded to the longest of their micro-batch."""
    assert_the_same_run(
        train_here(runs.recipe(algorithm), f"output_dir={tmp_path / 'one'}", "batch.micro_sequences=1"),
        runs.single(algorithm),
    )
    ragged = [
        train_here(
            runs.recipe(algorithm), f"output_dir={tmp_path / str(micro)}", f"batch.micro_sequences={micro}", *more
        )
        for micro in (1, 8)
        for more in [("data.packing=none",)]
    ]
    assert_the_same_run(*ragged)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["engine.activation_checkpointing=full", "engine.compile=true", "model.attention=eager"]
)
@pytest.mark.parametrize("algorithm", ["masked", "block", "uniform"])
def test_how_layers_run_changes_nothing(algorithm: str, option: str, runs: Runs, tmp_path: Path) -> None:
    """Masks go through recomputation and compilation, too."""
    assert_the_same_run(train_here(runs.recipe(algorithm), f"output_dir={tmp_path}", option), runs.single(algorithm))


@pytest.mark.slow
def test_lower_precisions_train(runs: Runs) -> None:
    """Losses, weights and masks in bf16 computation: near the float32 run, and no step is skipped."""
    jobs = [
        (algorithm, precision, engine, kernel)
        for algorithm in ("masked", "block", "absorbing", "uniform")
        for precision, engine, kernel in (
            ("bf16_autocast", "ddp", "eager"),
            ("bf16_autocast", "ddp", "sdpa"),
            ("bf16", "fsdp", "sdpa"),
            ("bf16_mixed", "fsdp", "sdpa"),
            ("bf16_mixed", "fsdp", "eager"),
            *([("bf16_mixed", "zero3", "sdpa")] if "zero3" in ENGINES else []),
        )
    ]
    found = runs.apart(
        [
            (job[0], [ENGINES[job[2]], f"precision={job[1]}", f"model.attention={job[3]}", "batch.micro_sequences=2"])
            for job in jobs
        ]
    )
    for job, run in zip(jobs, found, strict=True):
        records = [list(read_metrics(path / "metrics.jsonl")) for path in (run, runs.single(job[0]))]
        for ours, theirs in zip(*records, strict=True):
            for figure in {"loss", "eval_loss"} & theirs.keys():
                assert ours[figure] == pytest.approx(theirs[figure], rel=2e-2), (job, ours["step"], figure)
        assert records[0][-1]["skipped"] == 0


def test_a_run_of_every_algorithm_says_what_it_trained(runs: Runs) -> None:
    expected = {
        "masked": Diffusion("masked", 400, shift=True),
        "block": Diffusion("block", 400, shift=False, block_size=4),
        "absorbing": Diffusion("masked", 400, shift=False),
        "uniform": Diffusion("uniform", None, shift=False),
    }
    for algorithm, diffusion in expected.items():
        final = runs.single(algorithm) / "final"
        assert load_diffusion(final) == diffusion
        tokenizer = load_tokenizer(str(final))
        if diffusion.mask_token_id is not None:
            assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == 400
            assert final_weights(runs.single(algorithm))["model.embed_tokens.weight"].shape[0] == 401


RESUMED: dict[str, dict[str, Any]] = {
    "block, searched": ALGORITHMS["block, searched"],
    "masked": ALGORITHMS["masked, complementary, annealed, cropped"],
    "uniform": ALGORITHMS["uniform"],
}


@pytest.mark.parametrize("algorithm", RESUMED)
def test_resumed_equals_undisturbed_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    batch = {"sequences": 8, "micro_sequences": 4}
    evaluation = {"every": 3, "max_sequences": 40}
    recipe = write_recipe(tmp_path, algorithm=RESUMED[algorithm], batch=batch, evaluation=evaluation, steps=STEPS)
    whole = train_here(recipe)
    cut_after(whole, 3, tmp_path / "cut")
    resumed = train_here(recipe, f"output_dir={tmp_path / 'cut'}")
    assert_same(training_state(resumed, STEPS), training_state(whole, STEPS))
    assert_same(final_weights(resumed), final_weights(whole))
    clocks = ("time", "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    records = [
        [{key: value for key, value in record.items() if key not in clocks} for record in read_metrics(file)]
        for file in (whole / "metrics.jsonl", resumed / "metrics.jsonl")
    ]
    assert records[0] == records[1]
    if algorithm == "block, searched":
        ranges = [(record["eval_clip_low"], record["eval_clip_high"]) for record in records[0] if "eval_loss" in record]
        assert len(ranges) == 3 and ranges[1] != (0.0, 1.0)  # so that a range that was forgotten would show


def test_a_searched_range_is_what_is_trained_on(tmp_path: Path) -> None:
    """Without the search the same run is another one from its first step on."""
    searched = write_recipe(tmp_path, algorithm=RESUMED["block, searched"] | {"curriculum": []}, steps=2)
    run = train_here(searched)
    first = next(iter(read_metrics(run / "metrics.jsonl")))
    limits = [first["eval_clip_low"], first["eval_clip_high"]]
    asked = yaml.safe_load(searched.read_text())
    for name, clip in (("fixed", limits), ("none", None)):
        asked["algorithm"]["clip"], asked["name"] = clip, name
        searched.write_text(yaml.safe_dump(asked))
        other = train_here(searched)
        losses = [[record.get("loss") for record in read_metrics(path / "metrics.jsonl")] for path in (run, other)]
        assert (losses[0] == losses[1]) == (name == "fixed")
