"""How far a run is: what is counted, when it has diverged, and when it no longer gets better."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.contracts import StepResult
from llmtrain.errors import InputError, TrainingError
from llmtrain.recipe.schema import EarlyStopping

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The counters of a run; they are saved with each checkpoint.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens: tokens of text trained on, over all ranks.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: steps since the last one whose gradient and loss were finite. (Where only the loss is not, the
            step is made all the same: the loss is known after it.)
        best: the best held-out figure so far, of those that early stopping looks at.
        stale_evaluations: evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    stale_evaluations: int = 0

    def count(
        self, results: Mapping[str, StepResult], losses: Mapping[str, float], step_tokens: int, max_skipped: int
    ) -> None:
        """Counts a step that was made.

        Args:
            results: of each model.
            losses: of each model whose loss counted anything.
            step_tokens: of text, over all ranks.
            max_skipped: how many steps in a row may have a gradient or a loss that is not finite, less one.

        Raises:
            TrainingError: so many had.
        """
        self.step += 1
        self.tokens += step_tokens
        applied = all(result.applied for result in results.values())
        if applied and all(map(math.isfinite, losses.values())):
            self.skipped_in_a_row = 0
            return
        self.skipped += not applied
        self.skipped_in_a_row += 1
        norms = ", ".join(f"{name} {result.grad_norm}" for name, result in results.items())
        figures = f"norm: {norms}; loss: {', '.join(f'{name} {loss}' for name, loss in losses.items())}"
        if self.skipped_in_a_row >= max_skipped:
            raise TrainingError(
                f"step {self.step}: {self.skipped_in_a_row} steps in a row had a gradient or a loss that is not finite "
                f"({figures}); those without a finite gradient were skipped.\n  remedy: start a run of another "
                "name=... with a lower optimizer.lr, a longer schedule.warmup_steps, or precision fp32, and look for "
                "extreme settings of the algorithm; if the fault was the machine's, the same command goes on from the "
                "last checkpoint"
            )
        if self.skipped_in_a_row == 1:
            what = "loss" if applied else "gradient"
            done = "" if applied else ", and the step is skipped"
            log.warning("step %d: the %s is not finite (%s)%s", self.step, what, figures, done)

    def sum_up(self) -> None:
        """Says at the end of a run what else only its metrics would tell."""
        if self.skipped:
            log.warning("%d of %d steps were skipped, as their gradient was not finite", self.skipped, self.step)

    def judge(self, spec: EarlyStopping, figures: Mapping[str, float]) -> None:
        """Notes whether an evaluation was better than all before it; a figure that is not finite never is.

        Raises:
            InputError: the evaluation has no such figure.
        """
        if spec.metric not in figures:
            there = ", ".join(figures) or "none: no rows are held out"
            raise InputError(f"no held-out figure {spec.metric!r}; there are: {there}", where="early_stopping.metric")
        figure = figures[spec.metric]
        gain = math.inf if self.best is None else (self.best - figure) * (1 if spec.better == "min" else -1)
        if math.isfinite(figure) and gain > spec.min_delta:
            self.best, self.stale_evaluations = figure, 0
        else:
            self.stale_evaluations += 1
        if self.exhausted(spec):
            log.info(
                "early stopping after step %d: %s was no better than %s in %d evaluations",
                self.step,
                spec.metric,
                self.best,
                self.stale_evaluations,
            )

    def exhausted(self, spec: EarlyStopping | None) -> bool:
        """Whether the run is done before its last step."""
        return spec is not None and self.stale_evaluations >= spec.patience
