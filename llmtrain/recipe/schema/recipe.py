"""The recipe as a whole."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.adapter import Adapter
from llmtrain.recipe.schema.algorithm import DIFFUSION, SFT, Algorithm, BlockDiffusion, MaskedDiffusion, ScoreEntropy
from llmtrain.recipe.schema.around import EMA, Checkpoint, EarlyStopping, Evaluation, Logging, Samples, Watchdog
from llmtrain.recipe.schema.base import PositiveInt, Section
from llmtrain.recipe.schema.combinations import contradiction
from llmtrain.recipe.schema.data import Data
from llmtrain.recipe.schema.engine import AutoEngine, Engine
from llmtrain.recipe.schema.model import Model, ModelTokenizer, Tokenizer
from llmtrain.recipe.schema.preference import COMPARING, KTO, SCORING, Distillation, ProcessReward
from llmtrain.recipe.schema.training import AdamW, Batch, Schedule, exceeding

# Of fine-tuning, by what is trained: that of TRL's SFT for the whole model, ten times that for adapters in the
# layers ("LoRA Without Regret", 2025), and what the papers of the others use.
DEFAULT_LR: dict[str, float] = {
    "full": 2e-5,
    "lora": 2e-4,
    "peft": 2e-4,
    "ia3": 3e-3,
    "prompt_tuning": 3e-2,
    "prefix_tuning": 1e-2,
    "p_tuning": 1e-3,
}


# Of preferences, by algorithm, for the whole model and for LoRA: TRL's defaults and the papers', ten times as much
# for LoRA. There is none for other adapters.
PREFERENCE_LR: dict[str, dict[str, float]] = {
    "reward_model": {"full": 1e-5, "lora": 1e-4},
    "process_reward": {"full": 1e-5, "lora": 1e-4},
    "dpo": {"full": 1e-6, "lora": 1e-5},
    "kto": {"full": 1e-6, "lora": 1e-5},
    "orpo": {"full": 8e-6, "lora": 8e-5},
    "simpo": {"full": 1e-6, "lora": 1e-5},
}


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
    adapter: Adapter | None = Field(None, description="Train a small set of parameters; default: the whole model.")
    tokenizer: Tokenizer = Field(ModelTokenizer())
    data: Data
    algorithm: Algorithm
    optimizer: AdamW
    schedule: Schedule
    engine: Engine = Field(AutoEngine())
    ema: EMA | None = None
    evaluation: Evaluation = Field(Evaluation())
    early_stopping: EarlyStopping | None = None
    samples: Samples | None = None
    checkpoint: Checkpoint = Field(Checkpoint())
    watchdog: Watchdog = Field(Watchdog())
    logging: Logging = Field(Logging())

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs (null takes the other away)")
        if self.epochs is not None and (self.data.train[0].weight is not None or self.data.temperature is not None):
            raise ValueError("epochs has no meaning for a weighted mixture; give steps")
        if self.batch.tokens is not None and self.batch.tokens % self.sequence_length:
            raise ValueError(
                f"batch.tokens ({self.batch.tokens}) is no multiple of sequence_length ({self.sequence_length})"
            )
        if self.tokenizer.kind == "model" and self.model.kind == "config":
            raise ValueError("a model from a config brings no tokenizer; give tokenizer")
        if self.checkpoint.keep_best is not None and self.checkpoint.every % self.evaluation.every:
            raise ValueError(
                f"checkpoint.keep_best compares checkpoints by their own evaluations: make checkpoint.every "
                f"({self.checkpoint.every}) a multiple of evaluation.every ({self.evaluation.every})"
            )
        too_long = None if self.steps is None else exceeding(self.schedule, self.steps)
        if (problem := too_long or contradiction(self)) is not None:
            raise ValueError(problem)
        if self.optimizer.lr is None:
            self._take_default_lr()
        return self

    def _take_default_lr(self) -> None:
        if not self.fine_tunes:
            raise ValueError("optimizer has no lr, and only fine-tuning and learning from preferences have a default")
        trained = "full" if self.adapter is None else self.adapter.kind
        lr = PREFERENCE_LR.get(self.algorithm.kind, DEFAULT_LR).get(trained)
        if lr is None:
            raise ValueError(f"optimizer has no lr, and {self.algorithm.kind} with adapter {trained} has no default")
        # The section is frozen for its users; it is not in use yet.
        object.__setattr__(self, "optimizer", self.optimizer.model_copy(update={"lr": lr}))

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        assert self.optimizer.lr is not None
        return self.optimizer.lr

    @property
    def fine_tunes(self) -> bool:
        """Whether the data are examples, of which some tokens are trained, rather than texts."""
        algorithm = self.algorithm
        if isinstance(algorithm, DIFFUSION):
            return algorithm.task == "sft"
        return isinstance(algorithm, SFT | ProcessReward | Distillation) or self.compares

    @property
    def compares(self) -> bool:
        """Whether the data are groups of answers to a prompt, judged as wholes."""
        return isinstance(self.algorithm, (*COMPARING, KTO))

    @property
    def scores(self) -> bool:
        """Whether the model gets a head that scores in place of the one that predicts tokens."""
        return isinstance(self.algorithm, SCORING)

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers to a prompt share its computation."""
        return isinstance(self.algorithm, COMPARING) and self.algorithm.share_prompts

    @property
    def mask_token(self) -> str | None:
        """The token that stands for a masked one; None where the algorithm masks nothing."""
        algorithm = self.algorithm
        if not isinstance(algorithm, DIFFUSION) or (
            isinstance(algorithm, ScoreEntropy) and algorithm.noise == "uniform"
        ):
            return None
        return algorithm.mask_token

    @property
    def copies(self) -> int:
        """How often a forward holds each token: block diffusion's noisy and clean ones, complementary views."""
        algorithm = self.algorithm
        complementary = isinstance(algorithm, MaskedDiffusion) and algorithm.complementary
        return 2 if complementary or isinstance(algorithm, BlockDiffusion) else 1

    @property
    def packing(self) -> Literal["documents", "best_fit", "none"]:
        """How documents become rows."""
        if self.data.packing == "auto":
            return "best_fit" if self.fine_tunes else "documents"
        return self.data.packing

    @property
    def overflow(self) -> Literal["truncate", "split"]:
        """What becomes of a document that is longer than a row."""
        if self.data.overflow == "auto":
            return "truncate" if self.fine_tunes else "split"
        return self.data.overflow

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
