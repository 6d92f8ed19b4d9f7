"""The steps in which the open places of a canvas are written."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.sampling.canvas import Canvas, Layout
from llmtrain.sampling.denoising import Denoiser, Prefix
from llmtrain.sampling.samplers import ANCESTRAL_STEPS, Unmasking
from llmtrain.sampling.unmasking import (
    Policy,
    ancestral,
    at_random,
    by_confidence,
    by_threshold,
    first_hitting,
    top_probability,
)

# Logits [n, V] as they are to be drawn from, and the tokens [n] drawn from them; of places [n] in the flattened canvas.
Chooser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
AfterStep = Callable[[Canvas, Tensor], None]


@dataclass
class Work:
    """What was done.

    Attributes:
        forwards: calls of the model.
        row_forwards: texts in them; with guidance a text counts once.
        tokens: places that were written.
    """

    forwards: int = 0
    row_forwards: int = 0
    tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a text gets from a forward, on average."""
        return self.tokens / max(1, self.row_forwards)


def write(
    denoiser: Denoiser,
    layout: Layout,
    unmasking: Unmasking,
    times: Tensor,
    choose: Chooser,
    work: Work,
    after_step: AfterStep | None = None,
) -> None:
    """Writes all open places of the canvas, stage by stage.

    The number of forwards depends on the samplers llada and first-hitting only through the layout: ranks that share a
    sharded model make the same ones.

    Args:
        times: float64 [B, L], uniform in [0, 1): the order in which places are written, where it is random.
        choose: draws the tokens.
        work: is added to.
        after_step: called with the canvas and what was just written, bool [B, L]; it may close places that need not
            be written any more.
    """
    canvas = layout.canvas
    in_all = canvas.open.sum(1)
    blocks = denoiser.diffusion.block_size is not None
    kept = _Kept(exact=blocks) if unmasking.cache else None
    for start, end in layout.stages:
        in_stage = torch.zeros_like(canvas.open)
        in_stage[:, start:end] = True
        policy = policy_of(unmasking, canvas.open & in_stage, in_all, times)
        keep = max(0, start - (1 if denoiser.diffusion.shift else 0))
        turn = 0
        while (todo := canvas.open & in_stage).any():
            asked = policy.asked(turn, todo)
            first = turn == 0 and kept is not None and kept.exact
            rows = _numbers_of(canvas.open if first else todo)
            part = canvas.part(rows, end if blocks else canvas.ids.shape[1])
            where = asked[rows][:, : part.ids.shape[1]]
            prefix = None if kept is None else kept.of(rows, first=turn == 0)
            tokens, found = _predict(denoiser, part, where, rows, canvas.ids.shape[1], choose, prefix, keep)
            confidence = torch.zeros(canvas.ids.shape)
            index = (rows[where.nonzero()[:, 0]], where.nonzero()[:, 1])
            confidence[index] = found
            chosen = policy.chosen(turn, asked, confidence)
            written = torch.zeros_like(canvas.ids)
            written[index] = tokens
            canvas.ids[chosen] = written[chosen]
            canvas.open &= ~chosen
            work.forwards += 1
            work.row_forwards += len(rows)
            work.tokens += int(chosen.sum())
            if after_step is not None:
                after_step(canvas, chosen)
            turn += 1


def policy_of(unmasking: Unmasking, is_open: Tensor, in_all: Tensor, times: Tensor) -> Policy:
    """The policy of a stage.

    Args:
        is_open: bool [B, L], the stage's places.
        in_all: int64 [B], the places of all stages, over which the steps are spread.
        times: float64 [B, L], uniform in [0, 1).
    """
    in_stage = is_open.sum(1)
    match unmasking.sampler:
        case "threshold":
            return by_threshold(unmasking.threshold)
        case "first-hitting":
            return first_hitting(is_open, times)
        case "ancestral":
            return ancestral(is_open, _share(unmasking.steps or ANCESTRAL_STEPS, in_stage, in_all), times)
        case "llada":
            steps = in_stage if unmasking.steps is None else _share(unmasking.steps, in_stage, in_all)
            return (
                by_confidence(is_open, steps)
                if unmasking.remasking == "low-confidence"
                else at_random(is_open, steps, times)
            )


def _share(steps: int, in_stage: Tensor, in_all: Tensor) -> Tensor:
    """A stage's share of the steps, [B], rounded up."""
    return -(-steps * in_stage // in_all.clamp_min(1))


def _numbers_of(places: Tensor) -> Tensor:
    """Rows [R] that have any of the places [B, L]."""
    return places.any(1).nonzero().squeeze(1)


def _predict(
    denoiser: Denoiser,
    part: Canvas,
    where: Tensor,
    rows: Tensor,
    width: int,
    choose: Chooser,
    prefix: Prefix | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """Tokens and confidence, on the CPU, of the places `where` of some rows of a canvas of that width."""
    row, column = where.nonzero(as_tuple=True)
    in_canvas = rows[row] * width + column

    def of_logits(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        used, tokens = choose(logits, in_canvas[chunk])
        return tokens, top_probability(used)

    places = where.flatten().nonzero().squeeze(1)
    tokens, confidence = denoiser.predict(part, places, of_logits, prefix, keep)
    return tokens.cpu(), confidence.cpu()


class _Kept:
    """The prefix of the rows that are being written.

    Attributes:
        exact: it grows from stage to stage; else each stage computes it again.
    """

    def __init__(self, *, exact: bool):
        self.exact = exact
        self._whole, self._all_rows = Prefix(), torch.empty(0, dtype=torch.int64)
        self._current, self._rows = self._whole, self._all_rows

    def of(self, rows: Tensor, *, first: bool) -> Prefix:
        """For a forward on `rows`; `first` of a stage, whose rows the prefix is held for."""
        if first:
            self._whole = self._some(self._whole, self._all_rows, rows) if self.exact else Prefix()
            self._all_rows = self._rows = rows
            self._current = self._whole
        elif len(rows) < len(self._rows):
            self._current = self._some(self._current, self._rows, rows)
            self._rows = rows
        return self._current

    def _some(self, prefix: Prefix, held: Tensor, rows: Tensor) -> Prefix:
        if len(rows) == len(held):
            return prefix
        return prefix.of_rows(torch.searchsorted(held, rows), len(held))
