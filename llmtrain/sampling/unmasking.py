"""Which open places are written in which step: pure functions of what is open, random numbers and confidence.

    by_confidence   an even share of the open places in each step, the most confident first (LLaDA, arXiv 2502.09992:
                    low-confidence remasking, which masks all others again)
    at_random       the same shares in random order (LLaDA's random remasking)
    by_threshold    all that are confident enough, and at least one (Fast-dLLM, arXiv 2505.22618)
    ancestral       the reverse of the masking process in S even steps of time (MDLM, arXiv 2406.07524)
    first_hitting   the same in continuous time, one place a step (BD3-LM, arXiv 2503.09573)

Confidence is the probability of the most likely token, before temperature: which places are written then depends on
the text alone and not on what is drawn, and the likelihood of a text can be computed exactly by replaying the choice.
(LLaDA takes the probability of the drawn token, which at temperature 0 is the same.)

In the reverse process each masked place is unmasked at a time of its own, uniform in [0, 1], whatever the model says.
So the whole order is known before the first forward. In steps of time those places come together whose times fall
into the same step, and steps in which nothing happens need no forward, which is what MDLM's cache saves. With steps
without end they come one by one in random order: first hitting, whose times t *= u^(1/n) are the order statistics of
those uniform ones, and which the model is not told.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def top_probability(logits: Tensor) -> Tensor:
    """Confidence, [N], of logits [N, V]: the probability of the most likely token."""
    return (logits.amax(1) - logits.logsumexp(1)).exp()


def most_confident(confidence: Tensor, is_open: Tensor, num: Tensor) -> Tensor:
    """Of each row the `num` open places of the highest confidence; of equal ones the earliest.

    Args:
        confidence: float [B, L].
        is_open: bool [B, L].
        num: int [B].

    Returns:
        bool [B, L].
    """
    order = confidence.masked_fill(~is_open, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return is_open & (_ranks(order) < num.unsqueeze(1))


def above_threshold(confidence: Tensor, is_open: Tensor, threshold: float) -> Tensor:
    """The open places of at least this confidence, and the most confident one of each row that has any; [B, L]."""
    one = torch.ones(len(is_open), dtype=torch.int64, device=is_open.device)
    return (is_open & (confidence >= threshold)) | most_confident(confidence, is_open, one)


def even_counts(num_open: Tensor, steps: Tensor) -> Tensor:
    """How many of `num_open` [B] places are written in each of `steps` [B] steps: the remainder in the first ones.

    Steps beyond the number of places, or less than one, are brought into that range. Returns int64 [B, S].
    """
    steps = steps.minimum(num_open).clamp_min(1)
    step = torch.arange(int(steps.max()), device=num_open.device)
    counts = num_open.unsqueeze(1) // steps.unsqueeze(1) + (step < (num_open % steps).unsqueeze(1))
    return counts * (step < steps.unsqueeze(1))


class Policy(Protocol):
    """Which places of a stage are written in step `turn`, counted from 0."""

    def asked(self, turn: int, is_open: Tensor) -> Tensor:
        """Open places that the model has to be asked about: bool [B, L]."""
        ...

    def chosen(self, turn: int, asked: Tensor, confidence: Tensor) -> Tensor:
        """Those of them that are written: bool [B, L]; at least one of each row that has any."""
        ...


@dataclass(frozen=True)
class InOrder:
    """An order that is known beforehand: int64 [B, L], the turn in which each place is written."""

    turns: Tensor

    def asked(self, turn: int, is_open: Tensor) -> Tensor:
        return is_open & (self.turns == turn)

    def chosen(self, turn: int, asked: Tensor, confidence: Tensor) -> Tensor:
        return asked


@dataclass(frozen=True)
class MostConfident:
    """int64 [B, S]: how many are written in each turn."""

    counts: Tensor

    def asked(self, turn: int, is_open: Tensor) -> Tensor:
        return is_open

    def chosen(self, turn: int, asked: Tensor, confidence: Tensor) -> Tensor:
        return most_confident(confidence, asked, self.counts[:, turn])


@dataclass(frozen=True)
class AboveThreshold:
    threshold: float

    def asked(self, turn: int, is_open: Tensor) -> Tensor:
        return is_open

    def chosen(self, turn: int, asked: Tensor, confidence: Tensor) -> Tensor:
        return above_threshold(confidence, asked, self.threshold)


def by_confidence(is_open: Tensor, steps: Tensor) -> Policy:
    """See the module.

    Args:
        is_open: bool [B, L], the stage's.
        steps: int64 [B].
    """
    return MostConfident(even_counts(is_open.sum(1), steps))


def by_threshold(threshold: float) -> Policy:
    """See the module."""
    return AboveThreshold(threshold)


def at_random(is_open: Tensor, steps: Tensor, times: Tensor) -> Policy:
    """See the module; `times` [B, L] are uniform numbers in [0, 1)."""
    until = even_counts(is_open.sum(1), steps).cumsum(1)
    return InOrder(torch.searchsorted(until, _order(is_open, times), right=True))


def first_hitting(is_open: Tensor, times: Tensor) -> Policy:
    """See the module; `times` [B, L] are uniform numbers in [0, 1)."""
    return InOrder(_order(is_open, times))


def ancestral(is_open: Tensor, steps: Tensor, times: Tensor) -> Policy:
    """See the module; `times` [B, L] are uniform numbers in [0, 1), and steps [B] those from time 1 to 0."""
    bins = (times * steps.unsqueeze(1)).long().masked_fill(~is_open, int(steps.max()))
    in_order, index = bins.sort(dim=1, stable=True)
    # Steps in which nothing happens are left out: numbered are those that have a place.
    rises = torch.zeros_like(in_order)
    rises[:, 1:] = in_order.diff(dim=1) != 0
    return InOrder(torch.zeros_like(bins).scatter(1, index, rises.cumsum(1)))


def _order(is_open: Tensor, times: Tensor) -> Tensor:
    """Ranks of the open places by their times, [B, L]; those of other places come after them."""
    return _ranks(times.masked_fill(~is_open, torch.inf).sort(dim=1, stable=True).indices)


def _ranks(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)
