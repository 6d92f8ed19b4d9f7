"""Mistakes in a recipe, and the error that reports all of them together."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One mistake: its place (file and line, override, or key), and what is wrong."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class RecipeError(InputError):
    """Everything that is wrong with one recipe; the same on every rank.

    Args:
        source: the recipe as the user named it.
        problems: at least one mistake.
    """

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} mistakes in recipe {source}", *lines]
        super().__init__("\n  ".join(lines))
