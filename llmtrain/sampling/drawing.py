"""Tokens drawn from a model's probabilities, each with a random number of its own.

A number is a function of (seed, row, sample, place in the text, what it is for), so that what a text becomes does not
depend on its neighbours or on where an interrupted command went on. One number in float64 picks a token from the
cumulated probabilities; Gumbel noise on the logits, which also must be float64 (float32 cuts its tail off, and with
it the rare tokens), has the same distribution and takes a number for each token of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.counted_random import uniforms
from llmtrain.models.loss_head import EXCLUDED
from llmtrain.sampling.batched import Sampling, draw
from llmtrain.sampling.canvas import Layout
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.samplers import Unmasking
from llmtrain.sampling.uniform_noise import write_from_noise
from llmtrain.sampling.writing import AfterStep, Chooser, Work, write


@dataclass(frozen=True)
class Draws:
    """The random numbers of a canvas, and what is drawn with them.

    Attributes:
        names: (row, sample) of each text, whose numbers they are.
        starts: int64 [B], the column of each text's first token.
        not_here: bool [B, L]: places at which `excluded` tokens are not drawn.
        excluded: int64 [E].
    """

    sampling: Sampling
    names: Sequence[tuple[int, int]]
    starts: Tensor
    width: int
    not_here: Tensor | None = None
    excluded: Tensor | None = None

    def numbers(self, purpose: str, *counters: int) -> Tensor:
        """float64 [B, L], uniform in [0, 1)."""
        row, sample = (np.array(column)[:, None] for column in zip(*self.names, strict=True))
        place = np.arange(self.width)[None, :] - self.starts.numpy()[:, None]
        return torch.from_numpy(uniforms(self.sampling.seed, purpose, row, sample, place, *counters))

    def chooser(self, numbers: Tensor) -> Chooser:
        """Draws tokens with `numbers` [B, L], as the sampling says."""
        numbers = numbers.flatten()
        not_here = None if self.not_here is None else self.not_here.flatten()

        def choose(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            if not_here is not None and self.excluded is not None:
                is_excluded = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
                is_excluded[self.excluded.to(logits.device)] = True
                here = not_here[places].to(logits.device)
                logits = logits.masked_fill(here[:, None] & is_excluded[None, :], EXCLUDED)
            if self.sampling.is_greedy:
                return logits, logits.argmax(1)
            probabilities = torch.softmax(logits.double() / self.sampling.temperature, dim=1)
            uniform = numbers[places].to(logits.device)[:, None]
            return logits, draw(probabilities, uniform, self.sampling.top_p).squeeze(1)

        return choose


def write_texts(
    denoiser: Denoiser,
    layout: Layout,
    unmasking: Unmasking,
    draws: Draws,
    vocabulary: int,
    work: Work,
    after_step: AfterStep | None = None,
) -> None:
    """Writes all open places of the canvas, whatever the model's process is; arguments as for `write`.

    Args:
        vocabulary: tokens that uniform noise is made of.
    """
    if denoiser.diffusion.process == "uniform":
        steps = layout.canvas.open.sum(1)
        if unmasking.steps is not None:
            steps = torch.full_like(steps, unmasking.steps)
        write_from_noise(denoiser, layout, steps, vocabulary, draws.numbers, draws.chooser, work, after_step)
        return
    choose = draws.chooser(draws.numbers("token"))
    write(denoiser, layout, unmasking, draws.numbers("time"), choose, work, after_step)
