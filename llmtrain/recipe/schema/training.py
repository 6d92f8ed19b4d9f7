"""Batch, algorithm, optimizer, schedule."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.base import PositiveFloat, PositiveInt, Section


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


class ParameterGroup(Section):
    """Parameters with a learning rate of their own."""

    names: str = Field(description="Glob over parameter names, such as *lora_B* or *.embed_tokens.*.")
    lr_ratio: Annotated[float, Field(ge=0)] = Field(description="Their learning rate over that of the others.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Weight decay of all of them, vectors too; default: as without the group."
    )


class AdamW(Section):
    """AdamW (arXiv 1711.05101); biases, norms and other vectors are not decayed."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat | None = Field(
        None,
        description="Peak learning rate. Fine-tuning (algorithm sft) has a default for each method: "
        "see docs/fine-tuning.md.",
    )
    groups: list[ParameterGroup] = Field(
        default_factory=list,
        description="Parameters with a learning rate of their own; the first match counts. LoRA+ (arXiv 2402.12354) is "
        "[{names: '*lora_B*', lr_ratio: 16}].",
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="Decay rates of the two moments."
    )
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay of the matrices.")
    clip_norm: PositiveFloat | None = Field(1.0, description="Global gradient norm to clip to; null for no clipping.")
    max_skipped_steps: PositiveInt = Field(
        10,
        description="Steps in a row whose gradient (they are skipped and counted) or loss is not finite, after which "
        "the run fails; so it does where all of its steps are such.",
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


def exceeding(schedule: Schedule, num_steps: int) -> str | None:
    """Why the schedule's parts do not fit into a run of `num_steps`; None where they do."""
    decay = schedule.decay_steps if isinstance(schedule, WSD) else 0
    needed = schedule.warmup_steps + decay
    if needed <= num_steps:
        return None
    return (
        f"schedule.{'warmup_steps + decay_steps' if decay else 'warmup_steps'} ({needed}) exceeds steps ({num_steps})"
    )
