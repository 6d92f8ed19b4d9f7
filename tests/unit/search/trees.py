"""Answers as small trees with known values, in place of a policy and a judge."""

import math
from collections.abc import Callable, Sequence

from llmtrain.search.paths import Branch, Path

Value = Callable[[tuple[int, ...]], float]


class TreeDriver:
    """Every path goes on in `fan_out` ways, 0, 1, ..., and is whole after `depth` steps.

    Args:
        value: of a path, given the ways that it took.
        prior: of a path's last step; default: all are as likely.

    Attributes:
        calls: branches of each call of `extend`.
    """

    def __init__(
        self, fan_out: int, depth: int, value: Value, *, questions: int = 1, prior: Value | None = None
    ) -> None:
        self.num_questions = questions
        self.fan_out, self.depth, self.value, self.prior = fan_out, depth, value, prior
        self.calls: list[list[Branch]] = []
        self.num_steps = 0

    def extend(self, branches: Sequence[Branch]) -> list[Path]:
        self.calls.append(list(branches))
        self.num_steps += len(branches)
        paths = []
        for branch in branches:
            assert not branch.path.is_whole and branch.depth == len(branch.path.ids)
            ids = (*branch.path.ids, branch.sample % self.fan_out)
            whole = "stop" if len(ids) == self.depth else None
            paths.append(Path(branch.path.question, ids, "".join(map(str, ids)), whole))
        return paths

    def values(self, paths: Sequence[Path]) -> list[float]:
        return [self.value(path.ids) for path in paths]

    def log_probs(self, steps: Sequence[tuple[Path, Path]]) -> list[float]:
        if self.prior is None:
            return [-math.log(self.fan_out)] * len(steps)
        return [math.log(self.prior(after.ids)) for _, after in steps]
