"""What a search works on, and what it asks for: answers as far as they are written, whatever writes and judges them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Path:
    """An answer as far as it is written: up to the end of a step, or whole.

    Attributes:
        question: its number.
        ids: all tokens that were generated.
        text: without special tokens and stop texts.
        finish: None while it can go on; stop where the model (or a stop text) ended it, length where the limit or the
            window did.
    """

    question: int
    ids: tuple[int, ...] = ()
    text: str = ""
    finish: Literal["stop", "length"] | None = None

    @property
    def is_whole(self) -> bool:
        return self.finish is not None

    def plain(self) -> dict[str, Any]:
        """As JSON has it, and answers of `sampling/partial.py` are."""
        return {"text": self.text, "finish_reason": self.finish, "tokens": len(self.ids)}


@dataclass(frozen=True)
class Branch:
    """A step that is to be sampled.

    Attributes:
        path: what it goes on from; not whole.
        sample: with the question and the depth it names the random numbers.
        depth: steps that the path has.
    """

    path: Path
    sample: int
    depth: int


@dataclass(frozen=True)
class Found:
    """The answer that a search chose, and the judge's value of it."""

    path: Path
    value: float


class Driver(Protocol):
    """The policy and the judge of a search. Calls take all questions' work together, so that it is done in batches."""

    num_questions: int

    def extend(self, branches: Sequence[Branch]) -> list[Path]:
        """Each path with one step more, drawn from the policy."""
        ...

    def values(self, paths: Sequence[Path]) -> list[float]:
        """How good each path is, from 0 to 1: what a process reward model makes of its steps."""
        ...

    def log_probs(self, steps: Sequence[tuple[Path, Path]]) -> list[float]:
        """Of each (before, after), nats: how likely the policy takes this step."""
        ...


def distinct(paths: Sequence[Path]) -> list[Path]:
    """Without those whose tokens were there before."""
    first: dict[tuple[int, ...], Path] = {}
    for path in paths:
        first.setdefault(path.ids, path)
    return list(first.values())
