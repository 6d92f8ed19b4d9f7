"""Learning from preferences, from labelled steps and from a teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.base import PositiveInt, Section
from llmtrain.recipe.schema.model import Model

# Beyond what any run needs, and within what float32 can square, divide by and add up.
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[
    Literal["cached", "adapter_off"],
    Field(
        description="Where log-probabilities under the reference, the model as training finds it, come from. cached: "
        "they are computed once, before the first step, and kept in the run directory. adapter_off: in every step, by "
        "the model with its adapter switched off; for adapters inside layers that begin as nothing, as LoRA does."
    ),
]
SharePrompts = Annotated[
    bool,
    Field(
        description="The answers to a prompt share its computation, each seeing the prompt and itself: less work the "
        "longer prompts are. It needs attention that takes a mask (sdpa, eager, flex_attention). false: each answer "
        "stands with a prompt of its own."
    ),
]


class RewardModel(Section):
    """A score for answers, from answers that were compared (Bradley-Terry; of K ranked ones all pairs, InstructGPT)."""

    kind: Literal["reward_model"]
    centering: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.0, description="Weight of (score + score)^2 over each pair, which keeps scores around 0; try 0.01."
    )
    normalize: bool = Field(
        True,
        description="After training: the mean score of the best held-out answers becomes 0; the offset is saved in "
        "reward.json beside the weights.",
    )
    share_prompts: SharePrompts = True


class ProcessReward(Section):
    """Whether each step of an answer is right, from labelled steps (arXiv 2305.20050)."""

    kind: Literal["process_reward"]
    separator: Annotated[str, Field(min_length=1)] = Field(
        "\n", description="Stands after each step; a step is judged at its last token."
    )


class DPO(Section):
    """Direct preference optimisation (arXiv 2305.18290), IPO (arXiv 2310.12036), hinge (SLiC, arXiv 2305.10425)."""

    kind: Literal["dpo"]
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="What of the margin is minimised.")
    beta: Scale = Field(0.1, description="How far the policy may go from the reference: less is further.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of the preferences that are taken to be the wrong way round (conservative DPO)."
    )
    length_normalized: bool = Field(
        False, description="Log-ratios are means over an answer's tokens, not sums (as TRL's ipo has them)."
    )
    reference: Reference = "cached"
    share_prompts: SharePrompts = True

    @model_validator(mode="after")
    def _smoothing_is_sigmoid(self) -> "DPO":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for loss sigmoid, not {self.loss}")
        return self


class KTO(Section):
    """Answers that are good or bad, not compared (arXiv 2402.01306)."""

    kind: Literal["kto"]
    beta: Scale = Field(0.1, description="How far the policy may go from the reference: less is further.")
    desirable_weight: Scale = Field(
        1.0,
        description="What good answers count; the paper wants (good ones times their weight) / (bad ones times theirs) "
        "between 1 and 1.5.",
    )
    undesirable_weight: Scale = Field(1.0, description="What bad answers count.")
    reference: Reference = "cached"


class ORPO(Section):
    """Likelihood of the better answer and its odds against the worse one, without a reference (arXiv 2403.07691)."""

    kind: Literal["orpo"]
    beta: Scale = Field(0.1, description="Weight of the odds ratio (the paper's lambda).")
    share_prompts: SharePrompts = True


class SimPO(Section):
    """Mean log-probabilities with a target margin, without a reference (arXiv 2405.14734)."""

    kind: Literal["simpo"]
    beta: Scale = Field(2.0, description="Scale of the difference of mean log-probabilities.")
    gamma: Annotated[float, Field(ge=0, le=1e6)] = Field(1.0, description="The margin that is aimed at.")
    share_prompts: SharePrompts = True


class Distillation(Section):
    """A student learns the distribution of a teacher (GKD, arXiv 2306.13649)."""

    kind: Literal["distillation"]
    teacher: Model = Field(description="With the vocabulary of the student.")
    beta: Ratio = Field(
        0.5,
        description="0: KL(teacher || student), which covers all that the teacher may say. 1: KL(student || teacher), "
        "which keeps to what it is likely to say. Between: generalised Jensen-Shannon divergence.",
    )
    temperature: Temperature = Field(1.0, description="Logits of both are divided by it.")
    on_policy: Ratio = Field(
        0.0, description="Share of the rows whose answers are written by the student; the others are the data's."
    )
    max_new_tokens: PositiveInt = Field(128, description="Of an answer that the student writes.")
    sampling_temperature: Temperature = Field(1.0, description="Of the student's sampling.")


REFERENCED = (DPO, KTO)  # need log-probabilities under a reference
COMPARING = (RewardModel, DPO, ORPO, SimPO)  # read answers that were compared
SCORING = (RewardModel, ProcessReward)  # have a head that scores in place of one that predicts tokens
