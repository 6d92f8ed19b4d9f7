"""A reward model written by hand, which remembers what it was given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

Ids = Sequence[int]


@dataclass
class HandScorer:
    """Scores rows by a function of their ids; of steps it is given the ids up to the end of each."""

    tokenizer: PreTrainedTokenizerBase
    score: Callable[[Ids], float]
    kind: Literal["outcome", "process"] = "outcome"
    separator: str | None = None
    window: int | None = None
    rows: list[list[int]] = field(default_factory=list)

    def scores(self, rows: Sequence[Ids], batch_tokens: int = 8192) -> list[float]:
        assert self.kind == "outcome"
        self.rows += [list(row) for row in rows]
        return [self.score(row) for row in rows]

    def step_scores(self, rows: Sequence[tuple[Ids, Ids]], batch_tokens: int = 8192) -> list[list[float]]:
        assert self.kind == "process"
        self.rows += [list(ids) for ids, _ in rows]
        return [[self.score(ids[: end + 1]) for end in ends] for ids, ends in rows]
