"""Which places are written when."""

import pytest
import torch
from torch import Tensor

from llmtrain.sampling.unmasking import (
    Policy,
    above_threshold,
    ancestral,
    at_random,
    by_confidence,
    by_threshold,
    even_counts,
    first_hitting,
    most_confident,
    top_probability,
)


def on(*places: int, width: int = 6) -> Tensor:
    found = torch.zeros(width, dtype=torch.bool)
    found[list(places)] = True
    return found


def test_the_most_confident_and_of_equal_ones_the_earliest() -> None:
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.9, 1.0], [0.5] * 6])
    is_open = torch.stack([on(0, 1, 2, 3, 4), on(5, 2, 4)])
    assert most_confident(confidence, is_open, torch.tensor([2, 2])).tolist() == [
        on(1, 3).tolist(),
        on(2, 4).tolist(),
    ]
    assert torch.equal(most_confident(confidence, is_open, torch.tensor([9, 0])), torch.stack([is_open[0], on()]))


def test_above_a_threshold_and_at_least_one() -> None:
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.3, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0] * 6])
    is_open = torch.stack([on(0, 1, 2, 3, 4), on(0, 1, 2), on()])
    assert torch.equal(above_threshold(confidence, is_open, 0.9), torch.stack([on(1, 3), on(2), on()]))


def test_ties_are_broken_alike_however_many_places_there_are() -> None:
    for width in (3, 40, 1000):
        tied = torch.full((1, width), 0.25)
        assert most_confident(tied, torch.ones(1, width).bool(), torch.tensor([2]))[0].nonzero().flatten().tolist() == [
            0,
            1,
        ]


def test_top_probability() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top_probability(logits), logits.softmax(1).amax(1))


def test_lladas_schedule() -> None:
    """masks // steps in each step, and one more in each of the first masks % steps (its get_num_transfer_tokens)."""
    for masks in range(1, 20):
        for steps in range(1, masks + 1):
            base, remainder = divmod(masks, steps)
            expected = [base + 1] * remainder + [base] * (steps - remainder)
            assert even_counts(torch.tensor([masks]), torch.tensor([steps])).tolist() == [expected]
    counts = even_counts(torch.tensor([5, 2, 0]), torch.tensor([3, 9, 1]))
    assert counts.tolist() == [[2, 2, 1], [1, 1, 0], [0, 0, 0]]


def replay(policy: Policy, is_open: Tensor, confidence: Tensor) -> list[Tensor]:
    """What is chosen in each turn until nothing is open."""
    is_open, chosen = is_open.clone(), []
    while is_open.any():
        asked = policy.asked(len(chosen), is_open)
        assert not (asked & ~is_open).any()
        now = policy.chosen(len(chosen), asked, confidence)
        assert not (now & ~asked).any()
        assert torch.equal(now.any(1), is_open.any(1)), "each row that goes on has something written"
        is_open &= ~now
        chosen.append(now)
    return chosen


NUM_OPEN = torch.tensor([5, 1, 12])
OPEN = torch.stack([on(1, 3, 4, 8, 9, width=12), on(7, width=12), on(*range(12), width=12)])
STEPS = torch.tensor([2, 3, 5])
TIMES = torch.rand(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

POLICIES = {
    "by_confidence": by_confidence(OPEN, STEPS),
    "by_threshold": by_threshold(0.7),
    "at_random": at_random(OPEN, STEPS, TIMES),
    "ancestral": ancestral(OPEN, STEPS, TIMES),
    "first_hitting": first_hitting(OPEN, TIMES),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_open_place_is_written_once(name: str) -> None:
    confidence = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    chosen = replay(POLICIES[name], OPEN, confidence)
    assert torch.equal(torch.stack(chosen).sum(0), OPEN.long())
    per_row = torch.stack(chosen).sum(2).T.tolist()
    if name in ("by_confidence", "at_random"):
        assert per_row == [[3, 2, 0, 0, 0], [1, 0, 0, 0, 0], [3, 3, 2, 2, 2]]
    if name == "first_hitting":
        assert [row.count(1) for row in per_row] == NUM_OPEN.tolist() and max(map(max, per_row)) == 1


@pytest.mark.parametrize("name", ["at_random", "ancestral", "first_hitting"])
def test_an_order_known_beforehand_asks_only_for_what_it_writes(name: str) -> None:
    """So the head is computed for those places alone."""
    policy = POLICIES[name]
    asked = policy.asked(0, OPEN)
    assert torch.equal(policy.chosen(0, asked, torch.zeros(3, 12)), asked)
    assert asked.sum() < OPEN.sum()


def test_ancestral_steps_are_those_of_the_process() -> None:
    """The slow twin: at each step of time each place that is left is hit by its own time; empty steps are passed."""
    slow = []
    for step in range(int(STEPS.max())):
        in_step = (TIMES * STEPS[:, None] >= step) & (TIMES * STEPS[:, None] < step + 1) & OPEN
        slow.append(in_step)
    for row in range(3):
        ours = [chosen[row] for chosen in replay(POLICIES["ancestral"], OPEN, torch.zeros(3, 12)) if chosen[row].any()]
        theirs = [in_step[row] for in_step in slow if in_step[row].any()]
        assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_a_rows_steps_do_not_depend_on_its_neighbours() -> None:
    for name, alone in {
        "ancestral": ancestral(OPEN[:1], STEPS[:1], TIMES[:1]),
        "at_random": at_random(OPEN[:1], STEPS[:1], TIMES[:1]),
        "first_hitting": first_hitting(OPEN[:1], TIMES[:1]),
    }.items():
        together = replay(POLICIES[name], OPEN, torch.zeros(3, 12))
        for turn, chosen in enumerate(replay(alone, OPEN[:1], torch.zeros(1, 12))):
            assert torch.equal(chosen[0], together[turn][0])
