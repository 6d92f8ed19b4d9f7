"""The recipe as a whole."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.around import EMA, Checkpoint, Evaluation, Logging, Samples, Watchdog
from llmtrain.recipe.schema.base import PositiveInt, Section
from llmtrain.recipe.schema.combinations import contradiction
from llmtrain.recipe.schema.data import Data
from llmtrain.recipe.schema.engine import AutoEngine, Engine
from llmtrain.recipe.schema.model import Model, ModelTokenizer, Tokenizer
from llmtrain.recipe.schema.training import AdamW, Algorithm, Batch, Schedule, exceeding


class Recipe(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)] = Field(
        description="Name of the run; its directory is output_dir/name."
    )
    description: str = Field("", description="One line for `llmtrain recipes list`.")
    output_dir: str = Field("runs", description="Where run directories go.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of weights, data order and sampling.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is one.")
    precision: Literal["fp32", "bf16_autocast", "bf16_mixed", "bf16", "fp16_mixed"] = Field(
        "fp32",
        description="fp32. bf16_autocast: fp32 weights, matrix products in bf16. bf16_mixed (fsdp, deepspeed): the "
        "computation in bf16; weights, reduction of gradients and optimizer in fp32. bf16: weights, gradients and "
        "optimizer state in bf16. fp16_mixed (deepspeed on GPUs): as bf16_mixed, with a loss scale.",
    )
    sequence_length: Annotated[int, Field(ge=2, le=10**8)] = Field(description="Tokens in a row.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; this or epochs.")
    epochs: Annotated[float, Field(gt=0, le=10**12)] | None = Field(
        None, description="Passes over the training rows; this or steps."
    )
    batch: Batch
    model: Model
    tokenizer: Tokenizer = Field(ModelTokenizer())
    data: Data
    algorithm: Algorithm
    optimizer: AdamW
    schedule: Schedule
    engine: Engine = Field(AutoEngine())
    ema: EMA | None = None
    evaluation: Evaluation = Field(Evaluation())
    samples: Samples | None = None
    checkpoint: Checkpoint = Field(Checkpoint())
    watchdog: Watchdog = Field(Watchdog())
    logging: Logging = Field(Logging())

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs (null takes the other away)")
        if self.epochs is not None and self.data.train[0].weight is not None:
            raise ValueError("epochs has no meaning for a weighted mixture; give steps")
        if self.batch.tokens is not None and self.batch.tokens % self.sequence_length:
            raise ValueError(
                f"batch.tokens ({self.batch.tokens}) is no multiple of sequence_length ({self.sequence_length})"
            )
        if self.tokenizer.kind == "model" and self.model.kind == "config":
            raise ValueError("a model from a config brings no tokenizer; give tokenizer")
        too_long = None if self.steps is None else exceeding(self.schedule, self.steps)
        if (problem := too_long or contradiction(self)) is not None:
            raise ValueError(problem)
        return self

    @property
    def global_sequences(self) -> int:
        """Rows in the global batch."""
        if self.batch.sequences is not None:
            return self.batch.sequences
        assert self.batch.tokens is not None
        return self.batch.tokens // self.sequence_length

    @property
    def run_directory(self) -> Path:
        """Where the run writes: output_dir/name, ~ expanded."""
        return Path(self.output_dir).expanduser() / self.name
