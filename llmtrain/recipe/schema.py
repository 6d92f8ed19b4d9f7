"""The recipe: every key a user may write, with its meaning, default and bounds.

Pure pydantic: importing this costs no torch. The reference in docs/recipe.md is generated from
the descriptions here. A section that comes in kinds is a union discriminated by `kind`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A block of the recipe: unknown keys and mistyped values are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


AttentionKernel = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]
ATTENTION = (
    "Attention kernel; auto is sdpa where the architecture has it, eager elsewhere. flex_attention and "
    "flash_attention_2 (with the flash-attn package) train on GPUs only."
)


class ModelFromConfig(Section):
    """A new model with random weights, of any decoder architecture that transformers knows."""

    kind: Literal["config"]
    architecture: str = Field(description="transformers' model type: llama, qwen3, mamba2, ...")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of that architecture's configuration (hidden_size, num_hidden_layers, rope_parameters, "
        "...). vocab_size defaults to the tokenizer's, max_position_embeddings to sequence_length.",
    )
    attention: AttentionKernel = Field("auto", description=ATTENTION)


class ModelFromPretrained(Section):
    """Weights from a local directory or from the Hugging Face hub."""

    kind: Literal["pretrained"]
    path: str = Field(description="Local directory, or a hub name such as HuggingFaceTB/SmolLM2-135M.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights.")
    rope_parameters: dict[str, Any] | None = Field(
        None,
        description="Replaces the model's RoPE scaling, e.g. {rope_type: yarn, rope_theta: 10000.0, factor: 4.0}.",
    )
    attention: AttentionKernel = Field("auto", description=ATTENTION)


class ModelFromGGUF(Section):
    """Weights from a GGUF file, dequantised: they are not bit for bit those they were made from."""

    kind: Literal["gguf"]
    file: str = Field(description="Path of the .gguf file.")
    attention: AttentionKernel = Field("auto", description=ATTENTION)


Model = Annotated[ModelFromConfig | ModelFromPretrained | ModelFromGGUF, Field(discriminator="kind")]


class SentencePieceTokenizer(Section):
    """Trained by sentencepiece on the training data, then used as a Hugging Face fast tokenizer."""

    kind: Literal["sentencepiece"]
    vocab_size: Annotated[int, Field(ge=270)] = Field(
        description="Size of the vocabulary, with the 256 byte-fallback pieces and the special tokens."
    )
    model_type: Literal["bpe", "unigram"] = Field("bpe", description="Segmentation algorithm.")
    special_tokens: list[str] = Field(
        default_factory=list, description="Further special tokens beside <unk>, <s>, </s> and <pad>."
    )
    max_bytes: PositiveInt = Field(
        20_000_000, description="Bytes of training text to learn from, sampled evenly over the documents."
    )


class PretrainedTokenizer(Section):
    """A tokenizer from a local directory or from the Hugging Face hub."""

    kind: Literal["pretrained"]
    path: str = Field(description="Local directory or hub name.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")


class ModelTokenizer(Section):
    """The tokenizer that lies beside the pretrained model's weights."""

    kind: Literal["model"] = "model"


Tokenizer = Annotated[SentencePieceTokenizer | PretrainedTokenizer | ModelTokenizer, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------- data


class WeightedSource(Section):
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the training rows drawn from this source, relative to the other weights. Given for all "
        "training sources or for none; without weights every row is seen once an epoch.",
    )


class TextSource(WeightedSource):
    """UTF-8 text files."""

    kind: Literal["text"]
    paths: list[str] = Field(min_length=1, description="Files and globs; ** matches any depth.")
    document: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one document is: the file, a block between blank lines, or a line."
    )


class JSONLSource(WeightedSource):
    """JSON objects, one a line."""

    kind: Literal["jsonl"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")
    field: str = Field("text", description="The field that holds the text.")


class ParquetSource(WeightedSource):
    """Parquet files."""

    kind: Literal["parquet"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")
    field: str = Field("text", description="The column that holds the text.")


class PythonSource(WeightedSource):
    """A tree of Python files."""

    kind: Literal["python"]
    path: str = Field("stdlib", description="A directory, or stdlib for this interpreter's own library.")
    content: Literal["source", "docstrings", "both"] = Field(
        "source", description="Documents: whole modules, one a docstring, or both."
    )


class HuggingFaceSource(WeightedSource):
    """A dataset saved by `datasets` in a directory, or one from the hub."""

    kind: Literal["huggingface"]
    path: str = Field(description="Directory (save_to_disk or data files) or hub name.")
    config: str | None = Field(None, description="Configuration (subset) name.")
    split: str = Field("train", description="Which split to read.")
    field: str = Field("text", description="The column that holds the text.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")


Source = Annotated[
    TextSource | JSONLSource | ParquetSource | PythonSource | HuggingFaceSource, Field(discriminator="kind")
]


class Data(Section):
    """Where the text comes from and how it becomes rows."""

    train: list[Source] = Field(min_length=1, description="Training sources.")
    validation: list[Source] | None = Field(
        None, min_length=1, description="Held-out sources; without them, validation_fraction of train is held out."
    )
    validation_fraction: Share = Field(
        0.01, description="Share of the training documents held out, chosen by a hash of their text so it never moves."
    )
    packing: Literal["documents", "none"] = Field(
        "documents",
        description="documents: rows are filled with several documents, and attention stays inside each. "
        "none: one piece of one document a row, padded (for models with recurrent state).",
    )
    cache_dir: str | None = Field(
        None, description="Where tokenised data is kept; default $LLMTRAIN_CACHE or ~/.cache/llmtrain."
    )

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> "Data":
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("a weight is given for some training sources only; give it for all or for none")
        if any(source.weight is not None for source in self.validation or []):
            raise ValueError("validation sources take no weight: every held-out row is evaluated alike")
        return self


class Batch(Section):
    """The global batch of one optimizer step; how it is split is derived."""

    sequences: PositiveInt | None = Field(None, description="Global batch in rows of sequence_length.")
    tokens: PositiveInt | None = Field(None, description="Global batch in tokens, a multiple of sequence_length.")
    micro_sequences: PositiveInt | None = Field(
        None, description="Rows in one forward on one rank; default: the largest that keeps it at 8192 tokens or less."
    )

    @model_validator(mode="after")
    def _one_size(self) -> "Batch":
        if (self.sequences is None) == (self.tokens is None):
            raise ValueError("give exactly one of sequences and tokens (null takes the other away)")
        return self


# --------------------------------------------------------------- algorithm, optimizer, schedule


class CausalLM(Section):
    """Autoregressive language modelling: every token but a document's first is predicted."""

    kind: Literal["causal_lm"]


Algorithm = CausalLM  # becomes a union discriminated by `kind` with the second algorithm


class AdamW(Section):
    """AdamW (arXiv 1711.05101); biases, norms and other vectors are not decayed."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(description="Peak learning rate.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="Decay rates of the two moments."
    )
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay of the matrices.")
    clip_norm: PositiveFloat | None = Field(1.0, description="Global gradient norm to clip to; null for no clipping.")
    max_skipped_steps: PositiveInt = Field(
        10, description="Non-finite steps in a row (skipped and counted) after which the run fails."
    )


class Warmup(Section):
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up from zero.")


class Constant(Warmup):
    """Warm-up, then constant."""

    kind: Literal["constant"]


class Linear(Warmup):
    """Warm-up, then a straight line to min_ratio of the peak."""

    kind: Literal["linear"]
    min_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Final over peak learning rate.")


class Cosine(Warmup):
    """Warm-up, then half a cosine to min_ratio of the peak (arXiv 1608.03983)."""

    kind: Literal["cosine"]
    min_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Final over peak learning rate.")


class WSD(Warmup):
    """Warm-up, stable, decay: constant until the last decay_steps, then 1 - sqrt (arXiv 2405.18392)."""

    kind: Literal["wsd"]
    decay_steps: PositiveInt = Field(description="Steps of the final decay.")
    min_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Final over peak learning rate.")


Schedule = Annotated[Constant | Linear | Cosine | WSD, Field(discriminator="kind")]


class EngineOptions(Section):
    compile: bool = Field(False, description="torch.compile each decoder layer (first step takes longer).")
    activation_checkpointing: bool = Field(
        False, description="Recompute each decoder layer in backward: less memory for about a third more compute."
    )


class AutoEngine(EngineOptions):
    """single in one process, ddp in several."""

    kind: Literal["auto"] = "auto"
    timeout_seconds: PositiveInt = Field(1800, description="Deadline of every collective.")


class SingleEngine(EngineOptions):
    """One process, one device; starting it on several ranks is an error."""

    kind: Literal["single"]


class DDPEngine(EngineOptions):
    """DistributedDataParallel: whole model and optimizer on every rank; nccl on GPUs, gloo on CPUs."""

    kind: Literal["ddp"]
    timeout_seconds: PositiveInt = Field(1800, description="Deadline of every collective.")


Engine = Annotated[AutoEngine | SingleEngine | DDPEngine, Field(discriminator="kind")]


# ---------------------------------------------------------------------------- around the training


class EMA(Section):
    """Exponential moving average of the weights; evaluation, samples and final/ use it."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="Share kept of the average at each step.")


class Evaluation(Section):
    """Held-out loss, perplexity and bits per byte; always before the first and after the last step."""

    every: PositiveInt = Field(100, description="Steps between evaluations.")
    max_sequences: PositiveInt = Field(256, description="At most so many held-out rows, always the same ones.")


class Samples(Section):
    """Texts generated while training; always after the last step."""

    prompts: list[str] = Field(min_length=1, description="What the model is asked to continue.")
    every: PositiveInt = Field(500, description="Steps between samples.")
    max_new_tokens: PositiveInt = Field(64, description="Tokens to generate.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0 is greedy.")


class Checkpoint(Section):
    """When the training state is saved; always after the last step and on preemption."""

    every: PositiveInt = Field(500, description="Steps between checkpoints.")
    keep: PositiveInt = Field(2, description="How many of the newest to keep.")


class Logging(Section):
    """Figures and where they go, beside metrics.jsonl and the log files."""

    tensorboard: bool = Field(True, description="Write TensorBoard event files.")


class Recipe(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the run; its directory is output_dir/name."
    )
    description: str = Field("", description="One line for `llmtrain recipes list`.")
    output_dir: str = Field("runs", description="Where run directories go.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of weights, data order and sampling.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is one.")
    precision: Literal["fp32", "bf16_autocast", "bf16"] = Field(
        "fp32",
        description="fp32; bf16_autocast: fp32 weights and bf16 compute; bf16: weights, gradients and optimizer "
        "state in bf16.",
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(description="Tokens in a row.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; this or epochs.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the training rows; this or steps.")
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
        warmup, decay = self.schedule.warmup_steps, self.schedule.decay_steps if self.schedule.kind == "wsd" else 0
        if self.steps is not None and warmup + decay > self.steps:
            which = "warmup_steps + decay_steps" if decay else "warmup_steps"
            raise ValueError(f"schedule.{which} ({warmup + decay}) exceeds steps ({self.steps})")
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
