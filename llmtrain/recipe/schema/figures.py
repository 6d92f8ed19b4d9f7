"""Held-out figures: which ones each algorithm has, and whether less or more of them is better."""

from typing import Literal

from llmtrain.recipe.schema.algorithm import Algorithm, BlockDiffusion

Mode = Literal["min", "max"]

# Of the others neither is better in itself: log-probabilities of worse answers, say, or the mean of scores.
BETTER: dict[str, Mode] = {
    "loss": "min",
    "nll": "min",
    "perplexity": "min",
    "bits_per_byte": "min",
    "ece": "min",
    "accuracy": "max",
    "balanced_accuracy": "max",
    "margin": "max",
    "log_odds_ratio": "max",
}

_OF_TEXTS = ("loss", "perplexity", "bits_per_byte")
# By the algorithm's kind; metrics.jsonl has each as eval_<name>.
_HELD_OUT: dict[str, tuple[str, ...]] = {
    "causal_lm": _OF_TEXTS,
    "sft": _OF_TEXTS,
    "masked_diffusion": _OF_TEXTS,
    "block_diffusion": _OF_TEXTS,
    "score_entropy": _OF_TEXTS,
    "distillation": (*_OF_TEXTS, "nll"),
    "reward_model": ("loss", "accuracy", "margin", "ece", "score_mean", "score_std", "best_score"),
    "process_reward": ("loss", "accuracy", "balanced_accuracy", "share_right", "ece"),
    "dpo": ("loss", "accuracy", "margin", "reward_better", "reward_worse", "logprob_better", "logprob_worse"),
    "kto": ("loss", "accuracy", "kl", "reward_good", "reward_bad"),
    "orpo": ("loss", "accuracy", "nll", "log_odds_ratio", "logprob_better", "logprob_worse"),
    "simpo": ("loss", "accuracy", "margin", "logprob_better", "logprob_worse"),
}


def held_out_figures(algorithm: Algorithm) -> tuple[str, ...]:
    """Names of the figures that an evaluation of this algorithm gives."""
    searched = ("clip_low", "clip_high") if isinstance(algorithm, BlockDiffusion) and algorithm.clip == "search" else ()
    return (*_HELD_OUT[algorithm.kind], *searched)
