"""Tokens per forward against quality: what trained diffusion models write, the more of it at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtrain.models.saved import Saved, load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling
from llmtrain.sampling.diffusion import DiffusionGenerator
from llmtrain.sampling.samplers import Unmasking

HOLE = 16  # tokens
TOKENS_A_STEP = (1, 2, 4, 8)
THRESHOLDS = (0.95, 0.9, 0.7, 0.5, 0.3)


def curve(
    model: Path, rows: Sequence[list[int]], prompt: int, num_tokens: int, block_length: int
) -> list[dict[str, Any]]:
    """A line for each way of writing: tokens per forward, and the share of tokens that are right.

    Args:
        rows: texts as they are.
        prompt: tokens of a row that are continued by `num_tokens`; a hole is at their end.
        block_length: of models without blocks of their own.
    """
    saved = load_saved(str(model))
    assert saved.diffusion is not None
    lines = []
    for unmasking in ways(num_tokens, None if saved.diffusion.block_size else block_length):
        per_forward, found = written(saved, [row[:prompt] for row in rows], unmasking, num_tokens)
        line: dict[str, Any] = {"sampler": said(unmasking, num_tokens), "tokens_per_forward": round(per_forward, 2)}
        line["accuracy"] = accuracy(rows, slice(prompt, prompt + num_tokens), found)
        lines.append(line | filled(saved, rows, slice(prompt, prompt + HOLE), unmasking, num_tokens))
    return lines


def ways(num_tokens: int, block_length: int | None) -> Iterator[Unmasking]:
    """Even shares, and all above a threshold."""
    for at_once in TOKENS_A_STEP:
        yield Unmasking("llada", steps=num_tokens // at_once, block_length=block_length)
    for threshold in THRESHOLDS:
        yield Unmasking("threshold", threshold=threshold, block_length=block_length)


def said(unmasking: Unmasking, num_tokens: int) -> str:
    if unmasking.sampler == "threshold":
        return f"threshold {unmasking.threshold}"
    assert unmasking.steps is not None
    return f"llada, {num_tokens // unmasking.steps} a step"


def written(
    saved: Saved, prompts: Sequence[Sequence[int]], unmasking: Unmasking, num_tokens: int
) -> tuple[float, list[list[int]]]:
    """Tokens per forward, and the tokens; no token ends a text, so that each way writes as many."""
    generator = DiffusionGenerator(saved, [], Sampling(num_tokens, temperature=0.0), unmasking)
    done: dict[int, Completion] = {}
    generator.generate([Request(ids, row) for row, ids in enumerate(prompts)], done.__setitem__)
    return generator.work.tokens_per_forward, [list(done[row].ids) for row in range(len(prompts))]


def accuracy(rows: Sequence[Sequence[int]], part: slice, found: Sequence[Sequence[int]]) -> float:
    right = [a == b for row, ids in zip(rows, found, strict=True) for a, b in zip(row[part], ids, strict=True)]
    return sum(right) / len(right)


def filled(
    saved: Saved, rows: Sequence[list[int]], hole: slice, unmasking: Unmasking, num_tokens: int
) -> dict[str, float]:
    """The same of a hole in each row; as many tokens a step as unmasking writes in a text."""
    assert saved.diffusion is not None
    holed = [row[: hole.start] + [saved.diffusion.mask_token_id] * HOLE + row[hole.stop :] for row in rows]
    steps = None if unmasking.steps is None else unmasking.steps * HOLE // num_tokens
    how = Unmasking(unmasking.sampler, steps, None, threshold=unmasking.threshold)
    per_forward, found = written(saved, holed, how, HOLE)
    return {"hole_tokens_per_forward": round(per_forward, 2), "hole_accuracy": accuracy(rows, hole, found)}
