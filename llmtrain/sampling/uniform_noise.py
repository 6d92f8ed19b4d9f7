"""Sampling from models of uniform noise: all open places begin as random tokens, and are drawn anew step by step.

At rate p a token has been drawn anew from the V tokens with probability p, and else is x0. Of a token x at rate p the
model gives p(x0 | x) (`score_entropy.posterior_logits`); x0 is drawn from it, and then the token y at the lower rate q
from its distribution given both. With a = (1 - p) / (1 - q), the probability that nothing was drawn between the two,

    p(x | y) p(y | x0) = (a [x = y] + (1 - a) / V) ((1 - q) [y = x0] + q / V)

is a mixture of y = x, y = x0 and any y at all, which is drawn from without a sum over the vocabulary. Each place is
drawn by itself, so that few steps leave places that do not fit each other; at the last step q = 0 and y = x0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.algorithms.score_entropy import posterior_logits
from llmtrain.sampling.canvas import Canvas, Layout
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.writing import AfterStep, Chooser, Work

Numbers = Callable[[str, int], Tensor]  # of (purpose, step): float64 [B, L], uniform in [0, 1)


def write_from_noise(
    denoiser: Denoiser,
    layout: Layout,
    steps: Tensor,
    vocabulary: int,
    numbers: Numbers,
    chooser: Callable[[Tensor], Chooser],
    work: Work,
    after_step: AfterStep | None = None,
) -> None:
    """Writes all open places of the canvas.

    Args:
        steps: int64 [B], of each row.
        vocabulary: tokens that noise is made of.
        numbers: random ones.
        chooser: draws tokens with numbers [B, L].
        work: is added to.
        after_step: called with the canvas and the places whose token changed, bool [B, L].
    """
    canvas = layout.canvas
    is_open = canvas.open.clone()
    noise = (numbers("noise", 0) * vocabulary).long()
    canvas.ids[is_open] = noise[is_open]
    for step in range(int(steps.max())):
        rows = (steps > step).nonzero().squeeze(1)
        part = canvas.part(rows, canvas.ids.shape[1])
        row, column = part.open.nonzero(as_tuple=True)
        here = (rows[row], column)
        rates, lower = (1.0 - (step + done) / steps[here[0]] for done in (0, 1))
        seen = canvas.ids[here]
        choose = chooser(numbers("token", step))
        clean = _clean(denoiser, part, seen, rates.float(), rows[row] * canvas.ids.shape[1] + column, choose)
        tokens = _less_noisy(
            clean, seen, rates, lower, numbers("kind", step)[here], numbers("other", step)[here], vocabulary
        )
        changed = torch.zeros_like(is_open)
        changed[here] = tokens != seen
        canvas.ids[here] = tokens
        canvas.open[rows[steps[rows] == step + 1]] = False
        work.forwards += 1
        work.row_forwards += len(rows)
        if after_step is not None:
            after_step(canvas, changed)
    work.tokens += int(is_open.sum())


def _clean(denoiser: Denoiser, part: Canvas, seen: Tensor, rates: Tensor, in_canvas: Tensor, choose: Chooser) -> Tensor:
    """x0 of each open place of a part of the canvas, [N], drawn given the tokens `seen` there."""

    def of_logits(logits: Tensor, chunk: slice) -> tuple[Tensor]:
        likely = posterior_logits(logits, seen[chunk].to(logits.device), rates[chunk].to(logits.device))
        return (choose(likely, in_canvas[chunk])[1],)

    (clean,) = denoiser.predict(part, part.open.flatten().nonzero().squeeze(1), of_logits)
    return clean.cpu()


def _less_noisy(
    clean: Tensor, seen: Tensor, rates: Tensor, lower: Tensor, kind: Tensor, other: Tensor, vocabulary: int
) -> Tensor:
    """The tokens [N] at rates `lower`, given those `seen` at `rates` and `clean`; kind and other are uniform."""
    kept = (1.0 - rates) / (1.0 - lower)
    stays = kept * ((1.0 - lower) * (seen == clean) + lower / vocabulary)
    is_clean = (1.0 - kept) * (1.0 - lower) / vocabulary
    is_any = (1.0 - kept) * lower / vocabulary
    place = kind * (stays + is_clean + is_any)
    anything = (other * vocabulary).long()
    return torch.where(place < stays, seen, torch.where(place < stays + is_clean, clean, anything))
