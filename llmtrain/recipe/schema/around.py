"""What goes on around the training: averages, evaluation, samples, checkpoints, deadlines, logs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.base import PositiveInt, Section
from llmtrain.recipe.schema.figures import BETTER, Mode


class EMA(Section):
    """Exponential moving average of the weights; evaluation, samples and final/ use it."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="Share kept of the average at each step.")


class Evaluation(Section):
    """Held-out loss, perplexity and bits per byte; always before the first and after the last step."""

    every: PositiveInt = Field(100, description="Steps between evaluations.")
    max_sequences: PositiveInt = Field(256, description="At most so many held-out rows, always the same ones.")


class WatchedFigure(Section):
    metric: str = Field(
        "loss", description="A held-out figure of the algorithm: what metrics.jsonl has as eval_loss is loss."
    )
    mode: Mode | None = Field(
        None,
        description="Whether less or more of it is better. Only for figures of which that is not known: of loss, "
        "perplexity, accuracy, margin and the like it is.",
    )

    @property
    def better(self) -> Mode:
        """The mode, also where it is not said."""
        return self.mode or BETTER[self.metric]


class EarlyStopping(WatchedFigure):
    """End the run when a held-out figure no longer improves; it is then done, and exits with 0."""

    patience: PositiveInt = Field(3, description="Evaluations without an improvement after which it ends.")
    min_delta: Annotated[float, Field(ge=0)] = Field(0.0, description="Less than this is no improvement.")


class Samples(Section):
    """Texts generated while training; always after the last step."""

    prompts: list[str] = Field(min_length=1, description="What the model is asked to continue.")
    every: PositiveInt = Field(500, description="Steps between samples.")
    max_new_tokens: PositiveInt = Field(64, description="Tokens to generate.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0 is greedy.")


class Best(WatchedFigure):
    """Which checkpoint is the best one."""


class Checkpoint(Section):
    """When the training state is saved; always after the last step and on preemption."""

    every: PositiveInt = Field(500, description="Steps between checkpoints.")
    keep: PositiveInt = Field(2, description="How many of the newest to keep.")
    keep_every: PositiveInt | None = Field(None, description="Keep those of steps that this divides, too.")
    keep_best: Best | None = Field(None, description="Keep the best by a held-out figure, too.")
    export: Literal["last", "best"] = Field(
        "last", description="Which weights final/ holds: those after the last step, or the best checkpoint's."
    )
    asynchronous: bool = Field(
        True, description="Training goes on while files are written; it waits only for a copy into host memory."
    )
    on_full_disk: Literal["fail", "continue"] = Field(
        "fail", description="continue: a checkpoint that does not fit is left out with a warning, and the run goes on."
    )

    @model_validator(mode="after")
    def _best_is_known(self) -> "Checkpoint":
        if self.export == "best" and self.keep_best is None:
            raise ValueError("checkpoint.export best needs keep_best: {metric: loss}, to say which is the best")
        return self


class Watchdog(Section):
    """Deadlines in seconds: a rank that is longer in a phase ends the run, with every rank's stack in its log."""

    data: PositiveInt = Field(1800, description="Fetching a batch.")
    compute: PositiveInt = Field(1800, description="Forward and backward of a micro-batch.")
    collective: PositiveInt = Field(1800, description="Agreeing with the other ranks on a step before its forward.")
    update: PositiveInt = Field(1800, description="Reducing gradients and stepping the optimizer.")
    evaluation: PositiveInt = Field(3600, description="One evaluation, samples included.")
    save: PositiveInt = Field(3600, description="Saving or waiting for a checkpoint; exporting the model.")
    silence: PositiveInt = Field(60, description="Hearing nothing from a rank: its process or node is stopped or gone.")


class Logging(Section):
    """Figures and where they go, beside metrics.jsonl and the log files."""

    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
