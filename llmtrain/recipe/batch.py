"""How the declared global batch is split over ranks, micro-batches and accumulation steps."""

import math
from dataclasses import dataclass

from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import Recipe

# Rows in one forward are limited to so many tokens unless the recipe says otherwise: enough to fill a
# GPU's matrix units, and activations of a small model stay within a few GB.
MICRO_TOKENS = 8192


@dataclass(frozen=True)
class BatchPlan:
    """The split of one optimizer step: sequences = world_size * accumulation * micro_sequences.

    Attributes:
        sequences: rows in the global batch.
        micro_sequences: rows in one forward on one rank.
        accumulation: forwards of one rank in one optimizer step.
        world_size: ranks.
    """

    sequences: int
    micro_sequences: int
    accumulation: int
    world_size: int


def plan_batch(recipe: Recipe, world_size: int) -> BatchPlan:
    """Splits the global batch evenly over `world_size` ranks.

    Raises:
        RecipeError: it does not divide; the message names the nearest sizes that do.
    """
    sequences = recipe.global_sequences
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    if sequences % world_size:
        key, size = _declared(recipe)
        lower = sequences // world_size * world_size
        choices = [str(value * size) for value in (lower, lower + world_size) if value > 0]
        given = f"{sequences * size}" if size == 1 else f"{sequences * size} ({sequences} sequences)"
        raise _error(recipe, key, f"{given} does not divide over {ranks}: use {' or '.join(choices)}")
    share = sequences // world_size
    micro = recipe.batch.micro_sequences
    if micro is None:
        limit = max(1, MICRO_TOKENS // (recipe.sequence_length * recipe.copies))
        micro = max(divisor for divisor in _divisors(share) if divisor <= limit)
    elif share % micro:
        below = max(divisor for divisor in _divisors(share) if divisor < micro)
        above = min((divisor for divisor in _divisors(share) if divisor > micro), default=below)
        choices = [str(value) for value in dict.fromkeys((below, above))]
        share_text = f"a rank's share of {share} sequences ({sequences} over {ranks})"
        raise _error(
            recipe, "batch.micro_sequences", f"{micro} does not divide {share_text}: use {' or '.join(choices)}"
        )
    return BatchPlan(sequences, micro, share // micro, world_size)


def _error(recipe: Recipe, key: str, message: str) -> RecipeError:
    return RecipeError(recipe.name, [Problem(key, message)])


def _declared(recipe: Recipe) -> tuple[str, int]:
    """The key in which the user declared the batch, and what one sequence counts there."""
    return ("batch.sequences", 1) if recipe.batch.tokens is None else ("batch.tokens", recipe.sequence_length)


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]
