"""Accuracy against what it cost: the points of a search's methods, as a table, as JSON and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.evaluation.figures import Figure, mean
from llmtrain.pictures import Line, draw_lines
from llmtrain.tables import print_table

GREEDY = "greedy"
_HEADER = ("method", "budget", "accuracy", "stderr", "tokens", "scorer tokens", "rows")


class Result(NamedTuple):
    """What a method with a budget made of one question.

    Attributes:
        accuracy: whether it is right, or how often that is to be expected.
        generated: tokens of the policy, as they are to be expected.
        read: tokens of the reward model.
        chosen: the answer, for the rows of --samples.
    """

    accuracy: float
    generated: float
    read: float
    chosen: dict[str, Any]


class Point(NamedTuple):
    """A method with a budget, over all questions."""

    method: str
    budget: int
    results: Sequence[Result]

    @property
    def accuracy(self) -> Figure:
        return mean([result.accuracy for result in self.results])

    @property
    def generated(self) -> Figure:
        return mean([result.generated for result in self.results])

    @property
    def read(self) -> Figure:
        return mean([result.read for result in self.results])

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        figures = {"accuracy": self.accuracy, "tokens": self.generated, "scorer_tokens": self.read}
        plain = {name: {"value": figure.value, "stderr": figure.stderr} for name, figure in figures.items()}
        return {"method": self.method, "budget": self.budget, "rows": len(self.results), **plain}


def show(points: Sequence[Point]) -> None:
    """Prints them as a table."""
    rows = []
    for point in points:
        accuracy, error = point.accuracy.value, point.accuracy.stderr
        costs = f"{point.generated.value:.1f}", f"{point.read.value:.1f}"
        numbers = f"{accuracy:.4g}", "" if error is None else f"{error:.4g}"
        rows.append((point.method, str(point.budget), *numbers, *costs, str(len(point.results))))
    print_table(_HEADER, rows, right=_HEADER[1:])


def draw(file: Path, points: Sequence[Point], title: str) -> None:
    """A line for each method, in the order in which they come."""
    lines = []
    for method in dict.fromkeys(point.method for point in points):
        own = sorted((point for point in points if point.method == method), key=lambda point: point.budget)
        accuracies = [point.accuracy for point in own]
        x = [point.generated.value for point in own]
        lines.append(Line(method, x, [figure.value for figure in accuracies], [figure.stderr for figure in accuracies]))
    draw_lines(file, lines, title=title, x="tokens generated for a question", y="accuracy")
