"""The loop, through its public side: a real engine and observer, and a regression in place of a language model."""

import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from llmtrain.checkpoint.state import restore_state
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sample, Sum
from llmtrain.engines.replicated import ReplicatedEngine
from llmtrain.errors import TrainingError
from llmtrain.loop import Loop
from llmtrain.models.blueprint import Blueprint
from llmtrain.observe.flops import Peak
from llmtrain.observe.metrics import read_metrics
from llmtrain.observe.observer import Observer
from llmtrain.progress import Progress
from llmtrain.recipe.schema import Recipe
from llmtrain.schedule import learning_rate
from llmtrain.signals import StopRequest
from tests import tiny

CRITIC = "critic"
# With so large an eps a step is about proportional to the gradient: a wrong divisor shows in the weights.
ADAMW = {"kind": "adamw", "lr": 0.5, "eps": 10.0, "weight_decay": 0.0, "clip_norm": None, "max_skipped_steps": 3}
MakeBatch = Callable[[int], list[MicroBatch]]


def micro(num_rows: int, seed: int, weights: Mapping[str, float] | None = None, scale: float = 1.0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": scale * torch.randn(num_rows, 3, generator=generator),
        "y": torch.randn(num_rows, generator=generator),
    }
    return MicroBatch(tensors, {POLICY: float(num_rows), CRITIC: 2.0 * num_rows} | dict(weights or {}), 10 * num_rows)


def ragged(step: int) -> list[MicroBatch]:
    return [micro(rows, 10 * step + rows) for rows in (1, 2, 5)]


class Regression:
    """Squared error of the policy, and fourth power of the critic's; batches are what a function of the step gives."""

    def __init__(self, batches: MakeBatch = ragged):
        self.batches = batches
        self.evaluated: list[bool] = []  # whether a model was in training mode

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        step = first_step
        while True:
            yield self.batches(step)
            step += 1

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        errors = {name: model(micro.tensors["x"]).squeeze(1) - micro.tensors["y"] for name, model in models.items()}
        counted = micro.weights[POLICY] > 0
        sums = {name: (error ** (2 if name == POLICY else 4)).sum() * counted for name, error in errors.items()}
        absolute = errors[POLICY].detach().abs().sum() * counted
        return LossOutput(sums, {"absolute_error": Sum(absolute, micro.weights[POLICY])})

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        self.evaluated.append(any(model.training for model in models.values()) or torch.is_grad_enabled())
        return {"loss": self.loss(models, micro(4, 999)).sums[POLICY].item()}

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        return [Sample("one", " two")]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "regression"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state == {"kind": "regression"}


class Run:
    """A run in a directory: `go` trains to the end or the first stop."""

    def __init__(
        self,
        directory: Path,
        algorithm: Regression,
        *,
        models: Mapping[str, int] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        steps: int = 4,
        **overrides: Any,
    ):
        """`models`: the seed of each trainable model's weights."""
        often = {"evaluation": {"every": 100}, "checkpoint": {"every": 100, "keep": 100}}
        settings = often | {"schedule": {"kind": "linear"}, "steps": steps} | overrides
        self.recipe = tiny.recipe(optimizer=ADAMW | dict(optimizer or {}), **settings)
        self.engines = {name: engine(self.recipe, seed) for name, seed in (models or {POLICY: 0}).items()}
        self.directory, self.algorithm, self.stop = directory, algorithm, StopRequest()
        directory.mkdir(exist_ok=True)
        self.store = CheckpointStore(directory / "checkpoints", self.recipe.checkpoint, tiny.ALONE)
        self.loop = Loop(self.recipe, algorithm, self.engines, steps, self.store, self.stop)

    def resumed(self) -> "Run":
        newest = self.store.newest()
        assert newest is not None
        self.loop.progress = restore_state(self.store, newest, self.engines, self.algorithm, self.recipe, tiny.ALONE)
        return self

    def stopping_in(self, step: int) -> "Run":
        """It is asked to stop while it fetches the batch of that step, counted from 1."""
        batches = self.algorithm.batches

        def interrupted(index: int) -> list[MicroBatch]:
            if index + 1 == step:
                self.stop.signal = signal.SIGTERM
            return batches(index)

        self.algorithm.batches = interrupted
        return self

    def go(self) -> bool:
        begun = self.loop.progress.step
        peak = Peak(1e9, "no measure")
        observer = Observer(self.directory, tiny.ALONE, self.loop.num_steps, begun, peak, 1.0, tensorboard=False)
        with self.store, observer:  # as a run has them: a save that is under way when it fails is finished
            return self.loop.run(observer)

    def weights(self, name: str = POLICY) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.engines[name].model.parameters()]

    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.directory / "metrics.jsonl")

    def saved(self) -> list[str]:
        self.store.wait()  # for the one that is being written behind the loop
        return sorted(path.name for path in (self.directory / "checkpoints").iterdir())


class Made:
    """What an engine asks of a blueprint, of a module that is there."""

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def materialise(self, module: nn.Module, device: torch.device) -> None:
        module.to(device)


def engine(recipe: Recipe, seed: int) -> ReplicatedEngine:
    """The real engine around a model that is no decoder; what it asks of one beside layers is any module's."""
    torch.manual_seed(seed)
    return ReplicatedEngine(cast(Blueprint, Made(nn.Linear(3, 1))), recipe, tiny.ALONE)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------- sums, divided once


def test_ragged_micro_batches_give_the_mean_over_the_global_batch(tmp_path: Path) -> None:
    run = Run(tmp_path, Regression())
    model = deepcopy(run.engines[POLICY].model)
    assert run.go()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=10.0, weight_decay=0.0)
    for step, record in enumerate(run.records()[1:]):
        x, y = (torch.cat([part.tensors[name] for part in ragged(step)]) for name in ("x", "y"))
        error = model(x).squeeze(1) - y
        optimizer.zero_grad()
        error.square().mean().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert record["loss"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert record["absolute_error"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert record["lr"] == learning_rate(run.recipe.schedule, 0.5, step + 1, 4)
        optimizer.param_groups[0]["lr"] = record["lr"]
        optimizer.step()
    for ours, theirs in zip(run.weights(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [1.0, 0.01, 1000.0])
def test_the_divisor_is_the_total_weight_whatever_its_size(tmp_path: Path, unit: float) -> None:
    """Weights are what the algorithm says counts, and may well add up to less than one."""
    run = Run(
        tmp_path,
        Regression(lambda step: [micro(2, step, {POLICY: unit}), micro(2, step + 50, {POLICY: 3 * unit})]),
        steps=1,
    )
    model = deepcopy(run.engines[POLICY].model)
    run.go()
    parts = [micro(2, 0), micro(2, 50)]
    loss = sum((model(p.tensors["x"]).squeeze(1) - p.tensors["y"]).square().sum() for p in parts) / (4 * unit)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert run.records()[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert run.records()[1]["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_a_micro_batch_of_no_weight_fills_up_and_changes_nothing(tmp_path: Path) -> None:
    plain = Run(tmp_path / "plain", Regression())
    filled = Run(tmp_path / "filled", Regression(lambda step: [*ragged(step), micro(2, 77, {POLICY: 0.0})]))
    plain.go()
    filled.go()
    assert_same(plain.weights(), filled.weights())
    assert [record["loss"] for record in plain.records()[1:]] == [record["loss"] for record in filled.records()[1:]]


def test_a_batch_in_which_nothing_counts_has_gradient_zero(tmp_path: Path) -> None:
    """No NaN reaches the weights, and the run goes on; its loss is no number."""
    empty: MakeBatch = lambda step: [micro(2, step, {POLICY: 0.0})] if step == 1 else ragged(step)  # noqa: E731
    run = Run(tmp_path, Regression(empty))
    assert run.go()
    record = run.records()[2]
    assert record["grad_norm"] == 0.0
    assert math.isnan(record["loss"])
    assert record["skipped"] == 0
    assert all(weight.isfinite().all() for weight in run.weights())
    assert math.isfinite(run.records()[-1]["loss"])


# ----------------------------------------------------------------------------- non-finite steps


def with_bad_steps(*bad: int) -> Regression:
    """Steps are counted from 1."""
    return Regression(lambda step: [micro(2, step, scale=math.nan if step + 1 in bad else 1.0)])


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_weights_before_them(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", with_bad_steps(3, 4, 5), steps=20)
    message = r"step 5: 3 steps in a row .* not finite \(norm: policy nan; loss: policy nan\)"
    with pytest.raises(TrainingError, match=message) as caught:
        run.go()
    assert "optimizer.lr" in str(caught.value)
    assert run.loop.progress == Progress(step=5, tokens=100, skipped=3, skipped_in_a_row=3)
    assert [record["skipped"] for record in run.records()[1:]] == [0, 0, 1, 2]
    assert all(math.isnan(record["loss"]) for record in run.records()[3:])

    until_then = Run(tmp_path / "until then", with_bad_steps(), steps=20).stopping_in(2)
    until_then.go()
    assert_same(run.weights(), until_then.weights())


def test_a_finite_step_in_between_starts_the_count_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, with_bad_steps(2, 3, 5, 6, 8), steps=9)
    assert run.go()
    assert run.loop.progress == Progress(step=9, tokens=180, skipped=5, skipped_in_a_row=0)
    assert [record["skipped"] for record in run.records()[1:]] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert all(weight.isfinite().all() for weight in run.weights())


def test_the_count_outlives_a_resume(tmp_path: Path) -> None:
    """Or a run that is preempted often would never find out that it diverged."""
    first = Run(tmp_path, with_bad_steps(2, 3, 4), steps=9).stopping_in(3)
    assert not first.go()
    again = Run(tmp_path, with_bad_steps(2, 3, 4), steps=9, checkpoint={"every": 3, "keep": 9}).resumed()
    assert again.loop.progress == Progress(step=3, tokens=60, skipped=2, skipped_in_a_row=2)
    with pytest.raises(TrainingError, match="step 4: 3 steps in a row"):
        again.go()


def test_a_short_run_whose_steps_are_all_bad_has_failed(tmp_path: Path) -> None:
    run = Run(tmp_path, with_bad_steps(1, 2), steps=2)
    with pytest.raises(TrainingError, match="step 2: 2 steps in a row"):
        run.go()
    assert run.store.newest() is None


def test_bad_steps_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first of a row, and at the end how many there were."""
    run = Run(tmp_path, with_bad_steps(2, 3, 5), steps=6)
    with caplog.at_level(logging.WARNING):
        assert run.go()
    assert [record.getMessage() for record in caplog.records if record.name == "llmtrain.progress"] == [
        "step 2: the gradient is not finite (norm: policy nan; loss: policy nan), and the step is skipped",
        "step 5: the gradient is not finite (norm: policy nan; loss: policy nan), and the step is skipped",
        "3 of 6 steps were skipped, as their gradient was not finite",
    ]


def test_losses_that_are_not_finite_end_the_run_as_gradients_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class InfiniteLoss(Regression):
        """In steps 2, 4, 5 and 6, with the gradients that there are."""

        def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
            output = super().loss(models, micro)
            infinite = models[POLICY].training and run.loop.progress.step + 1 in (2, 4, 5, 6)
            return LossOutput({POLICY: output.sums[POLICY] + math.inf}) if infinite else output

    run = Run(tmp_path, InfiniteLoss(), steps=9, checkpoint={"every": 1, "keep": 1})
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TrainingError, match=r"step 6: 3 steps .*; loss: policy inf\)"),
    ):
        run.go()
    assert run.loop.progress == Progress(step=6, tokens=480, skipped=0, skipped_in_a_row=3)
    assert "step 2: the loss is not finite (norm: policy" in caplog.text
    newest = run.store.newest()
    assert newest is not None and newest.name == "step-00000003"


def test_a_diverging_run_keeps_the_checkpoints_from_before(tmp_path: Path) -> None:
    run = Run(tmp_path, with_bad_steps(3, 4, 5), steps=9, checkpoint={"every": 1, "keep": 1})
    with pytest.raises(TrainingError):
        run.go()
    newest = run.store.newest()
    assert newest is not None and newest.name == "step-00000002"


# ----------------------------------------------------------------------------- several models


def test_models_are_trained_apart_each_with_its_own_sums_and_weights(tmp_path: Path) -> None:
    both = Run(tmp_path / "both", Regression(), models={POLICY: 0, CRITIC: 1})
    alone = Run(tmp_path / "alone", Regression())
    both.go()
    alone.go()
    assert_same(both.weights(POLICY), alone.weights(POLICY))

    class Quartic(Regression):
        """The critic's loss and weight, as the only model's."""

        def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
            error = models[POLICY](micro.tensors["x"]).squeeze(1) - micro.tensors["y"]
            return LossOutput({POLICY: (error**4).sum()})

    def critics_weight(step: int) -> list[MicroBatch]:
        return [MicroBatch(part.tensors, {POLICY: part.weights[CRITIC]}, part.num_tokens) for part in ragged(step)]

    critic = Run(tmp_path / "critic", Quartic(critics_weight), models={POLICY: 1})
    critic.go()
    assert_same(both.weights(CRITIC), critic.weights(POLICY))
    for two, one, other in zip(*(run.records()[1:] for run in (both, alone, critic)), strict=True):
        assert (two["loss"], two["grad_norm"]) == (one["loss"], one["grad_norm"])
        assert (two["critic_loss"], two["critic_grad_norm"]) == (other["loss"], other["grad_norm"])


def test_a_bad_step_of_one_model_is_counted_and_named(tmp_path: Path) -> None:
    class BadCritic(Regression):
        def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
            output = super().loss(models, micro)
            return LossOutput({**output.sums, CRITIC: output.sums[CRITIC] * math.nan}, output.metrics)

    run, alone = Run(tmp_path / "a", BadCritic(), models={POLICY: 0, CRITIC: 1}), Run(tmp_path / "b", Regression())
    before = run.weights(CRITIC)
    with pytest.raises(TrainingError, match=r"norm: policy [0-9.]+, critic nan"):
        run.go()
    assert_same(run.weights(CRITIC), before)
    alone.go()
    assert [record["grad_norm"] for record in run.records()[1:]] == [r["grad_norm"] for r in alone.records()[1:3]]


# ------------------------------------------------------------------------- around the training


def test_evaluation_samples_and_checkpoints_come_when_asked_and_at_the_end(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        Regression(),
        steps=7,
        evaluation={"every": 3},
        samples={"prompts": ["one"], "every": 4},
        checkpoint={"every": 2, "keep": 100},
    )
    assert run.go()
    assert [record["step"] for record in run.records()] == list(range(8))
    assert [record["step"] for record in run.records() if "eval_loss" in record] == [0, 3, 6, 7]
    assert run.algorithm.evaluated == [False] * 4  # in evaluation mode, without gradients
    assert run.engines[POLICY].model.training
    assert run.saved() == [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": step, "prompt": "one", "completion": " two"} for step in (4, 7)]


def test_a_record_says_what_was_done(tmp_path: Path) -> None:
    run = Run(tmp_path, Regression(), steps=2)
    run.go()
    first, second = run.records()[1:]
    assert (first["tokens"], first["step_tokens"]) == (80, 80)
    assert (second["tokens"], second["step_tokens"]) == (160, 80)
    assert first["step_seconds"] > 0 and second["time"] > first["time"]
    assert first.keys() >= {"tokens_per_second", "mfu", "peak_memory_bytes", "absolute_error", "lr", "skipped"}


def test_a_stop_ends_after_the_step_with_a_checkpoint_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", Regression(), steps=6)
    assert whole.go()
    run = Run(tmp_path / "run", Regression(), steps=6).stopping_in(2)
    assert run.go() is False
    assert run.saved() == ["step-00000002"]
    again = Run(tmp_path / "run", Regression(), steps=6).resumed()
    assert again.loop.progress == Progress(step=2, tokens=160)
    assert again.go() is True
    assert_same(again.weights(), whole.weights())
    assert [r["loss"] for r in again.records()[1:]] == [r["loss"] for r in whole.records()[1:]]


def test_a_stop_in_the_last_step_is_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, Regression(), steps=3).stopping_in(3)
    assert run.go() is True
    assert run.saved() == ["step-00000003"]


def test_a_run_that_is_at_its_end_does_nothing(tmp_path: Path) -> None:
    Run(tmp_path, Regression(), steps=2).go()
    again = Run(tmp_path, Regression(lambda step: pytest.fail("a batch was fetched")), steps=2).resumed()
    assert again.go() is True
    assert [record["step"] for record in again.records()] == [0, 1, 2]


def test_a_stop_before_the_first_step_neither_evaluates_nor_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, Regression())
    run.stop.signal = signal.SIGTERM
    assert run.go() is False
    assert run.algorithm.evaluated == [] and run.records() == []
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("stopped_in", "steps_done"), [(1, 0), (2, 3)])
def test_a_stop_while_it_evaluates_costs_no_further_step(tmp_path: Path, stopped_in: int, steps_done: int) -> None:
    """The evaluations are those before the first step and after the third."""

    class Interrupted(Regression):
        def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
            figures = super().evaluate(models, device)
            if len(self.evaluated) == stopped_in:
                run.stop.signal = signal.SIGUSR1
            return figures

    run = Run(tmp_path, Interrupted(), steps=9, evaluation={"every": 3})
    assert run.go() is False
    assert run.records()[-1]["step"] == run.loop.progress.step == steps_done
    assert not steps_done or run.saved() == [f"step-{steps_done:08d}"]
