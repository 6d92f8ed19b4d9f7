"""The one training loop: for every algorithm, on every engine.

It fetches the micro-batches of an optimizer step, sums their weights over all ranks, and divides
each loss sum by that total; all else is the algorithm's or the engine's.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmtrain import distributed
from llmtrain.checkpoint.state import save_state
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.contracts import POLICY, Algorithm, Engine, MicroBatch, Sum, mark_last
from llmtrain.observe.observer import Observer
from llmtrain.observe.phases import Phases
from llmtrain.progress import Progress
from llmtrain.recipe.schema import Recipe
from llmtrain.schedule import learning_rate
from llmtrain.signals import StopRequest


@dataclass
class Loop:
    """A run in progress.

    Attributes:
        engines: one for each trainable model, by the names the algorithm's losses are keyed with.
        num_steps: steps of the whole run.
        stop: set when this rank is asked to stop; a stop on any rank stops all.
        phases: read by the watchdog.
    """

    recipe: Recipe
    algorithm: Algorithm
    engines: Mapping[str, Engine]
    num_steps: int
    store: CheckpointStore
    stop: StopRequest
    phases: Phases = field(default_factory=Phases)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._figures: dict[str, float] = {}  # held-out ones, of the newest evaluation
        self.models = {name: engine.model for name, engine in self.engines.items()}
        self.device = self.engines[POLICY].device

    def run(self, observer: Observer) -> bool:
        """Trains to the last step. Returns False when stopped before it, with a checkpoint saved.

        Early stopping makes the step at which it strikes the last one.
        """
        recipe, progress = self.recipe, self.progress
        stopping = distributed.on_any_rank(bool(self.stop))
        if progress.step == 0 and not stopping:
            observer.step({"step": 0, "time": time.time(), "tokens": 0} | self._evaluate(observer))
            stopping = distributed.on_any_rank(bool(self.stop))
        batches = self.algorithm.step_batches(progress.step)
        while not self._done() and not stopping:
            record, stopping = self._step(batches)
            done = self._done()
            # When stopping nothing but the checkpoint: whoever sent the signal may not wait for more.
            evaluating = done or (not stopping and progress.step % recipe.evaluation.every == 0)
            self._figures = {}  # those that are saved with a checkpoint are its own
            if evaluating:
                record |= self._evaluate(observer)
                done = self._done()
            sampling = recipe.samples and (done or (not stopping and progress.step % recipe.samples.every == 0))
            observer.step(record)
            if sampling:
                self._sample(observer)
            if (evaluating or sampling) and not done:
                stopping = distributed.on_any_rank(bool(self.stop))
            # Not while steps are skipped: a run that diverges shall not push out the checkpoints from before.
            if done or stopping or (progress.step % recipe.checkpoint.every == 0 and not progress.skipped_in_a_row):
                self._save(required=stopping and not done)
        with self.phases("save"):
            self.store.wait()
        if self._done():
            progress.sum_up()
        return self._done()

    def _done(self) -> bool:
        return self.progress.step >= self.num_steps or self.progress.exhausted(self.recipe.early_stopping)

    def _step(self, batches: Any) -> tuple[dict[str, float], bool]:
        """One optimizer step. Returns its record, and whether some rank was asked to stop."""
        started = time.perf_counter()
        with self.phases("data"):
            batch: list[MicroBatch] = next(batches)
        names = list(self.engines)
        mine = [sum(micro.weights[name] for micro in batch) for name in names]
        # One collective for all that must be known before the forward.
        with self.phases("collective"):
            *weights, step_tokens = distributed.sum_scalars([*mine, sum(micro.num_tokens for micro in batch)])
        totals = dict(zip(names, weights, strict=True))
        lr = learning_rate(self.recipe.schedule, self.recipe.peak_lr, self.progress.step + 1, self.num_steps)
        sums = self._forward_backward(batch, totals)
        with self.phases("update"):
            results = {name: engine.step(lr) for name, engine in self.engines.items()}
            averages = distributed.average(sums | {"stop": Sum(float(bool(self.stop)), 1.0)})  # in one collective
        stopping = averages.pop("stop") > 0
        losses = {name: averages[_key("loss", name)] for name in names if totals[name]}
        most = min(self.recipe.optimizer.max_skipped_steps, self.num_steps)  # a run that is all bad has failed
        self.progress.count(results, losses, int(step_tokens), most)
        self.phases.step = self.progress.step

        record: dict[str, float] = {
            "step": self.progress.step,
            "time": time.time(),
            **averages,
            **{_key("grad_norm", name): result.grad_norm for name, result in results.items()},
            "lr": lr,
            "tokens": self.progress.tokens,
            "step_tokens": step_tokens,
            "step_seconds": time.perf_counter() - started,
            "skipped": self.progress.skipped,
        }
        return record, stopping

    def _forward_backward(self, batch: list[MicroBatch], totals: Mapping[str, float]) -> dict[str, Sum]:
        """Accumulates the gradient of each loss sum over its total; returns this rank's metric sums."""
        sums: dict[str, Sum] = {}

        def add(name: str, value: Tensor | float, weight: float) -> None:
            before = sums.get(name, Sum(0.0, 0.0))
            sums[name] = Sum(before.value + value, before.weight + weight)

        for micro, last in mark_last(batch):
            with ExitStack() as stack:
                stack.enter_context(self.phases("compute"))
                for engine in self.engines.values():
                    stack.enter_context(engine.accumulate(last))
                output = self.algorithm.loss(self.models, micro.to(self.device))
                for name, engine in self.engines.items():
                    # A global batch in which nothing counts has sum 0, and shall have gradient 0 and not NaN.
                    engine.backward(output.sums[name] / (totals[name] or 1.0))
                    add(_key("loss", name), output.sums[name].detach(), micro.weights[name])
            for name, (value, weight) in output.metrics.items():
                add(name, value, weight)
        return sums

    def evaluate(self) -> dict[str, float]:
        """The held-out figures of the weights as they are."""
        with self._evaluating():
            return self.algorithm.evaluate(self.models, self.device)

    def _evaluate(self, observer: Observer) -> dict[str, float]:
        figures = self.evaluate()
        self._figures = figures
        if figures:
            observer.evaluation(self.progress.step, figures)
        if self.recipe.early_stopping is not None:
            self.progress.judge(self.recipe.early_stopping, figures)
        return {f"eval_{name}": value for name, value in figures.items()}

    def _save(self, *, required: bool = False) -> None:
        with self.phases("save"):
            figures, recipe = self._figures, self.recipe
            save_state(self.store, self.progress, self.engines, self.algorithm, figures, recipe, required=required)

    def _sample(self, observer: Observer) -> None:
        with self._evaluating():
            samples = self.algorithm.samples(self.models, self.device)
        observer.samples(self.progress.step, samples)

    def _evaluating(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.phases("evaluation"))
        for engine in self.engines.values():
            stack.enter_context(engine.evaluating())
        return stack


def _key(figure: str, model: str) -> str:
    return figure if model == POLICY else f"{model}_{figure}"
