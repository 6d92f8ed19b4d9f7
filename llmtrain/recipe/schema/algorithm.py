"""What is learnt: the algorithms, each with its own settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.base import PositiveFloat, PositiveInt, Section, Share
from llmtrain.recipe.schema.preference import DPO, KTO, ORPO, Distillation, ProcessReward, RewardModel, SimPO


class CausalLM(Section):
    """Autoregressive language modelling: every token but a document's first is predicted."""

    kind: Literal["causal_lm"]


class SFT(Section):
    """Supervised fine-tuning: of a conversation the assistant's tokens are predicted, of a text all."""

    kind: Literal["sft"]
    loss: Literal["nll", "dft"] = Field(
        "nll",
        description="nll: cross-entropy. dft: each token's loss times its own probability, without its gradient "
        "(arXiv 2508.05629).",
    )
    neftune_alpha: PositiveFloat | None = Field(
        None, description="Noise on the embeddings while training, of this size (NEFTune, arXiv 2310.05914); try 5."
    )


class Diffusion(Section):
    """What the diffusion algorithms have in common."""

    task: Literal["pretrain", "sft"] = Field(
        "pretrain",
        description="pretrain: every token of a text is learnt. sft: the data are examples as for algorithm sft, whose "
        "prompts stay clean.",
    )
    mask_token: str = Field(
        "<|mask|>",
        description="The token that stands for a masked one. Where the tokenizer has none of this name it is added, "
        "and its embedding begins as the mean of the others. One that is there is special, and no word of texts.",
    )
    eps: Annotated[float, Field(gt=0, le=0.1)] = Field(1e-3, description="Least rate of masking in training.")
    shift: bool = Field(
        False,
        description="Row i - 1 predicts token i, as in autoregressive models: what they know of predicting stays of "
        "use when one is adapted.",
    )
    normalization: Literal["tokens", "sequences"] = Field(
        "tokens",
        description="tokens: the loss sum over all trained tokens of the global batch. sequences: the mean over "
        "documents of each one's loss over its own trained tokens, as LLaDA's fine-tuning does.",
    )
    eos_padding: PositiveInt | None = Field(
        None,
        description="For task sft: end-of-text tokens, to be predicted, fill each example to a multiple of so many "
        "tokens, so that the model learns to end an answer within the length it is given (LLaDA); sequence_length "
        "fills the row. Default: none, and of block diffusion its block_size, of which it is a multiple.",
    )

    @property
    def filled_to(self) -> int | None:
        """Documents are filled with end-of-text tokens to a multiple of so many."""
        return self.eos_padding

    @model_validator(mode="after")
    def _padding_has_examples(self) -> "Diffusion":
        if self.eos_padding is not None and self.task != "sft":
            raise ValueError("eos_padding is for task sft: texts end where they end")
        return self


class MaskedDiffusion(Diffusion):
    """Masked diffusion (LLaDA, arXiv 2502.09992; MDLM, arXiv 2406.07524) with bidirectional attention."""

    kind: Literal["masked_diffusion"]
    random_length_share: Share = Field(
        0.0, description="Share of the training rows cut to a random length (LLaDA's pretraining: 0.01)."
    )
    complementary: bool = Field(
        False,
        description="See each row twice in a step, masked and with the other tokens masked: less variance, and twice "
        "the computation.",
    )
    annealing_steps: PositiveInt | None = Field(
        None,
        description="Begin with causal attention, and let each further pair of tokens see each other with a "
        "probability that rises to 1 in so many steps (DiffuLLaMA, arXiv 2410.17891: 10000); default: at once.",
    )

    @model_validator(mode="after")
    def _examples_stay_whole(self) -> "MaskedDiffusion":
        if self.random_length_share and self.task == "sft":
            raise ValueError("random_length_share is for task pretrain: it would cut answers away")
        return self

    def annealed(self, step: int) -> float:
        """The probability at optimizer step `step`, counted from 0."""
        return 1.0 if self.annealing_steps is None else min(1.0, (step + 1) / self.annealing_steps)


class BlockStage(Section):
    from_step: Annotated[int, Field(ge=0)] = Field(description="The optimizer step at which it begins.")
    block_size: PositiveInt = Field(description="Tokens of a block from then on.")


class BlockDiffusion(Diffusion):
    """Block diffusion (BD3-LM, arXiv 2503.09573): diffusion in a block, autoregression over blocks."""

    kind: Literal["block_diffusion"]
    block_size: PositiveInt = Field(description="Tokens of a block; with a curriculum, of its last part.")
    curriculum: list[BlockStage] = Field(
        default_factory=list,
        description="Block sizes before that one, e.g. [{from_step: 0, block_size: 1}, {from_step: 1000, block_size: "
        "4}, {from_step: 2000, block_size: 16}]; the last entry has block_size itself.",
    )
    clip: list[Annotated[float, Field(ge=0, le=1)]] | Literal["search"] | None = Field(
        None,
        description="Rates of masking to train on, [low, high], for less variance (published: [0.45, 0.95] for blocks "
        "of 4, [0.3, 0.8] of 16, [0.0, 0.5] of 128). search: at each evaluation the range of least variance on "
        "held-out rows. Default: all rates.",
    )

    @model_validator(mode="after")
    def _is_sound(self) -> "BlockDiffusion":
        if isinstance(self.clip, list) and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise ValueError("clip is [low, high] with low < high")
        steps = [stage.from_step for stage in self.curriculum]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError("curriculum begins with from_step 0, and each of the others is later than the one before")
        if self.curriculum and self.curriculum[-1].block_size != self.block_size:
            raise ValueError("the last entry of curriculum has another block_size than the algorithm")
        if self.eos_padding is not None and self.eos_padding % self.block_size:
            raise ValueError("eos_padding is a multiple of block_size: what is decoded is whole blocks")
        return self

    @property
    def filled_to(self) -> int | None:
        """Whole blocks: what is decoded is a block, anywhere in which a text may end."""
        return self.block_size if self.eos_padding is None else self.eos_padding

    def block_size_at(self, step: int) -> int:
        """Tokens of a block at optimizer step `step`, counted from 0."""
        sizes = [stage.block_size for stage in self.curriculum if stage.from_step <= step]
        return sizes[-1] if sizes else self.block_size


class ScoreEntropy(Diffusion):
    """Score entropy (SEDD, arXiv 2310.16834): ratios of probabilities are learnt, with bidirectional attention."""

    kind: Literal["score_entropy"]
    noise: Literal["absorbing", "uniform"] = Field(
        "absorbing",
        description="absorbing: tokens become the mask token. uniform: tokens become any other token.",
    )


DIFFUSION = (MaskedDiffusion, BlockDiffusion, ScoreEntropy)
Algorithm = Annotated[
    CausalLM
    | SFT
    | MaskedDiffusion
    | BlockDiffusion
    | ScoreEntropy
    | RewardModel
    | ProcessReward
    | DPO
    | KTO
    | ORPO
    | SimPO
    | Distillation,
    Field(discriminator="kind"),
]
