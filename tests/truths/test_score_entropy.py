"""Score entropy against SEDD's diffusion weighted denoising score entropy, summed over the vocabulary by loops.

DWDSE = integral d sigma  E over x_sigma of  sum over i, y != x_i  Q(x_i, y) [s_y - r_y log s_y + r_y (log r_y - 1)]
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.algorithms.masking import rows_of
from llmtrain.algorithms.score_entropy import (
    absorbing_divergence,
    divergence_from_uniform,
    posterior_logits,
    uniform_divergence,
)
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.evaluation.likelihood import bound, uniform_bound
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from tests import tiny
from tests.noise import (
    LENGTH,
    MASK,
    MODELS,
    ROWS,
    assert_same_training,
    decoder,
    documents,
    masked_in,
    masked_loss,
    micro_of,
    score_entropy,
    spans_of,
)

V = 7
RATES = (1e-3, 0.05, 0.4, 0.9, 0.999)


def logits_of(rows: int, vocabulary: int = V, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def transition(rate: float, x0: int, x: int, vocabulary: int = V) -> float:
    """p_sigma(x | x0) with uniform noise: a token is drawn anew with probability `rate`."""
    return (1 - rate) * (x == x0) + rate / vocabulary


def entropy_term(score: float, ratio: float) -> float:
    """s - r log s + r (log r - 1), with 0 log 0 = 0."""
    return score + (ratio * (math.log(ratio) - 1 - math.log(score)) if ratio > 0 else 0.0)


# Uniform noise


@pytest.mark.parametrize("rate", RATES)
def test_the_posterior_is_by_bayes(rate: float) -> None:
    """p(x0 | x) in proportion to (what the model expects there) * p_sigma(x | x0)."""
    logits = logits_of(V)
    seen = torch.arange(V)
    found = posterior_logits(logits, seen, torch.full((V,), rate, dtype=torch.float64)).softmax(1)
    for row in range(V):
        joint = [math.exp(logits[row, x0]) * transition(rate, x0, row) for x0 in range(V)]
        np.testing.assert_allclose(found[row], np.asarray(joint) / sum(joint), rtol=1e-9)


def uniform_by_loops(probabilities: Tensor, target: int, seen: int, rate: float) -> float:
    """The sum over y != x of it, with s = E over p(x0 | x) of p_sigma(y | x0) / p_sigma(x | x0)."""
    total = 0.0
    for y in range(V):
        if y == seen:
            continue
        score = sum(probabilities[x0].item() * transition(rate, x0, y) / transition(rate, x0, seen) for x0 in range(V))
        total += entropy_term(score, transition(rate, target, y) / transition(rate, target, seen))
    return total


@pytest.mark.parametrize("rate", RATES)
def test_uniform_divergence_equals_the_sum_over_the_vocabulary(rate: float) -> None:
    for seed, (target, seen) in enumerate(itertools.product(range(V), range(V))):
        logits = logits_of(1, seed=seed)
        at = torch.tensor([rate], dtype=torch.float64)
        ours = uniform_divergence(logits, torch.tensor([target]), torch.tensor([seen]), at).item()
        theirs = uniform_by_loops(posterior_logits(logits, torch.tensor([seen]), at)[0].softmax(0), target, seen, rate)
        assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-11), (target, seen)


@pytest.mark.parametrize("rate", [1e-3, 0.5, 0.999])
def test_uniform_divergence_in_float32(rate: float) -> None:
    """Where s is near r the textbook form would lose all digits; gradients too, at a real vocabulary."""
    vocabulary, rows = 50_000, 6
    logits = logits_of(rows, vocabulary).requires_grad_()
    targets, seen = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 2, 30_000, 40_000, 5, 6])
    at = torch.full((rows,), rate).double()  # what float32 has for it
    exact = uniform_divergence(logits, targets, seen, at)
    (gradient,) = torch.autograd.grad(exact.sum(), logits)
    rough = logits.detach().float().requires_grad_()
    ours = uniform_divergence(rough, targets, seen, at.float())
    (own,) = torch.autograd.grad(ours.sum(), rough)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-6)
    # Relative to its norm, and where it all but vanishes to the loss that it is the gradient of.
    assert ((own - gradient).norm(dim=1) <= 1e-4 * gradient.norm(dim=1) + 1e-7 * exact).all()


def test_exact_scores_have_no_divergence_on_average_left() -> None:
    """Of all scores the expected loss is least at the true ones: the gradient vanishes at the true posterior."""
    prior, rate = torch.rand(V, dtype=torch.float64) + 0.1, 0.3
    prior /= prior.sum()
    logits = prior.log().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for x0, x in itertools.product(range(V), range(V)):
        chance = prior[x0] * transition(rate, x0, x)
        term = uniform_divergence(
            logits[None], torch.tensor([x0]), torch.tensor([x]), torch.tensor([rate], dtype=torch.float64)
        )
        expected = expected + chance * term[0]
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kept", [1e-3, 0.2, 0.9])
def test_what_is_left_of_a_token_at_the_end(kept: float) -> None:
    chances = [transition(1 - kept, 2, x) for x in range(V)]
    assert divergence_from_uniform(kept, V) == pytest.approx(sum(p * math.log(p * V) for p in chances), rel=1e-9)


TOY = np.random.default_rng(3).random((4, 4)) ** 3 + 0.01  # two tokens of four kinds, far from independent
TOY /= TOY.sum()


def toy_logits(rate: float, place: int, x: tuple[int, int]) -> Tensor:
    """log p(x0 at `place` | the other place is x), exact at this noise level."""
    other = x[1 - place]
    joint = TOY if place == 0 else TOY.T
    weights = [sum(joint[x0, o0] * transition(rate, o0, other, 4) for o0 in range(4)) for x0 in range(4)]
    return torch.tensor(weights, dtype=torch.float64).log()


def toy_integrand(rate: float, x0: tuple[int, int]) -> float:
    """d bound / d rate of the text x0: over all x and both places, Q = 1 / V and d sigma = d rate / (1 - rate)."""
    total = 0.0
    at = torch.tensor([rate], dtype=torch.float64)
    for x in itertools.product(range(4), repeat=2):
        chance = math.prod(transition(rate, x0[place], x[place], 4) for place in range(2))
        for place in range(2):
            divergence = uniform_divergence(
                toy_logits(rate, place, (x[0], x[1]))[None], torch.tensor([x0[place]]), torch.tensor([x[place]]), at
            )
            total += chance * divergence.item() / 4 / (1 - rate)
    return total


def toy_integral(x0: tuple[int, int], low: float, high: float, num: int) -> float:
    """By Gauss-Legendre in u, rate = low + (high - low) u^2 (3 - 2u), which is fine at both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    u = (nodes + 1) / 2
    rates = low + (high - low) * u * u * (3 - 2 * u)
    widths = (high - low) * 6 * u * (1 - u) * weights / 2
    return float(sum(width * toy_integrand(rate, x0) for rate, width in zip(rates, widths, strict=True)))


@pytest.mark.parametrize("x0", [(0, 0), (3, 1), (2, 2)])
def test_with_exact_scores_the_bound_is_the_likelihood(x0: tuple[int, int]) -> None:
    """The integral over all noise levels plus what is left at its end: -log p(x0)."""
    eps = 1e-3
    # The tokens are then all but uniform, and independent of each other.
    bound = toy_integral(x0, 0.0, 1 - eps, 48) + 2 * divergence_from_uniform(eps, 4)
    assert bound == pytest.approx(-math.log(TOY[x0]), abs=2e-4)


def test_what_is_left_below_eps_is_what_undoing_it_costs() -> None:
    """On average over the texts: the integral below eps is E[-log p(x0 | x)] at eps, place by place, from above."""
    eps = 1e-2
    texts = list(itertools.product(range(4), repeat=2))
    integral = sum(TOY[x0] * toy_integral(x0, 0.0, eps, 10) for x0 in texts)
    undone = 0.0
    at = torch.tensor([eps], dtype=torch.float64)
    for x0, x in itertools.product(texts, texts):
        chance = math.prod(transition(eps, x0[place], x[place], 4) for place in range(2))
        for place in range(2):
            logp = posterior_logits(toy_logits(eps, place, x)[None], torch.tensor([x[place]]), at).log_softmax(1)
            undone -= TOY[x0] * chance * logp[0, x0[place]].item()
    assert 0 < integral <= undone < 1.05 * integral


# Absorbing noise


@pytest.mark.parametrize("rate", RATES)
def test_absorbing_divergence_equals_the_sum_over_the_vocabulary(rate: float) -> None:
    """Of a masked token, Q = 1: with r = (1 - p) / p at x0 and 0 elsewhere, and s = r exp(z) / (V - 1)."""
    logits = logits_of(1)
    logits[0, V - 1] = -1e30  # the mask itself
    ratio = (1 - rate) / rate
    for target in range(V - 1):
        total = 0.0
        for y in range(V - 1):
            score = ratio * math.exp(logits[0, y]) / (V - 1)
            total += entropy_term(score, ratio if y == target else 0.0)
        by_rate = total / (1 - rate)  # d sigma = d rate / (1 - rate)
        ours = absorbing_divergence(logits, torch.tensor([target])).item() / rate
        assert ours == pytest.approx(by_rate, rel=1e-9, abs=1e-12)


def test_absorbing_divergence_of_probabilities_is_cross_entropy() -> None:
    """Truth 14: with s = p r, r * CE; and per d rate, CE / rate."""
    logits = logits_of(5)
    logits[:, V - 1] = -1e30
    probabilities = logits.log_softmax(1)
    targets = torch.tensor([0, 1, 2, 3, 4])
    ours = absorbing_divergence(probabilities + math.log(V - 1), targets)
    torch.testing.assert_close(ours, -probabilities.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)


# Both, in the loss of a model


def scores_of(
    model: Decoder, before: MicroBatch, ids: Tensor, loss: Callable[[Tensor, int, int], Tensor], *, shift: bool
) -> Tensor:
    """Sum of `loss` (of a token's logits, its row and its place) over each document in a forward of its own."""
    total = torch.zeros(())
    for row, spans in enumerate(spans_of(before)):
        for span in spans:
            length = len(span)
            visible = torch.zeros(1, 1, length, length)  # additive: all
            logits = model.hf(
                input_ids=ids[row, span.start : span.stop][None],
                position_ids=torch.arange(length)[None],
                attention_mask=visible,
            ).logits[0]
            for own, place in enumerate(span):
                if before.tensors["trained"][row, place]:
                    total = total + loss(logits[own - (1 if shift else 0)], row, place)
    return total


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_the_absorbing_loss_of_packed_documents(architecture: str, attention: str, shift: bool) -> None:
    model, process = decoder(architecture, attention), score_entropy("absorbing", shift=shift)
    before = micro_of(ROWS, LENGTH)
    noised = process.noised(1, before)
    masks = masked_in(before, noised, shift=shift)

    def plain(logits: Tensor, row: int, place: int) -> Tensor:
        if place not in masks[row]:
            return torch.zeros(())
        kept = torch.arange(tiny.VOCABULARY) != MASK
        scores = logits[kept].exp() / (tiny.VOCABULARY - 1)
        divergence = scores.sum() - (logits[masks[row][place].target].exp() / (tiny.VOCABULARY - 1)).log() - 1
        return masks[row][place].weight * divergence

    theirs = scores_of(model, before, noised.tensors["input_ids"], plain, shift=shift)
    assert_same_training(model, process.loss(model, noised).sums[POLICY], theirs, of_gradients=1e-5)


def test_absorbing_masks_and_bounds_are_those_of_masked_diffusion() -> None:
    """Scores that are normalised give masked diffusion's loss: in training, and held out."""
    model, process = decoder(), score_entropy("absorbing")
    before = micro_of(ROWS, LENGTH)
    for noised in (process.noised(1, before), process.held_out(before, 3)):
        masks = masked_in(before, noised, shift=False)
        theirs = masked_loss(model, before, masks)

        # The head's logits, made log-probabilities of V - 1 tokens times V - 1.
        theirs_of = Normalised(model)
        torch.testing.assert_close(process.loss(theirs_of, noised).sums[POLICY], theirs, rtol=4e-6, atol=0)


class Normalised(torch.nn.Module):
    """A decoder whose scores are probabilities."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, head: Any, visible: Any) -> Tensor:
        found: Tensor = self.model(
            ids, positions, lambda states, own: head(normalised(own(states)), identity()), visible
        )
        return found


def normalised(logits: Tensor) -> Tensor:
    excluded = torch.zeros(logits.shape[-1])
    excluded[MASK] = -1e30
    return (logits + excluded).log_softmax(-1).clamp_min(-1e30) + math.log(logits.shape[-1] - 1)


def identity() -> torch.nn.Linear:
    head = torch.nn.Linear(tiny.VOCABULARY, tiny.VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(tiny.VOCABULARY))
    return head


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_the_uniform_loss_of_packed_documents(architecture: str, attention: str, shift: bool) -> None:
    """Every trained token counts, changed or not; weight (1 - 2 eps) / ((1 - p) V)."""
    eps = 0.01
    model, process = decoder(architecture, attention), score_entropy("uniform", shift=shift, eps=eps)
    before = micro_of(ROWS, LENGTH)
    noised = process.noised(1, before)
    width, rate_at = LENGTH, {}
    for head, rate, weight, seen in zip(
        *(noised.tensors[name].tolist() for name in ("heads", "rates", "row_weights", "seen")), strict=True
    ):
        row, place = divmod(head + (1 if shift else 0), width)
        rate_at[row, place] = rate
        assert weight == pytest.approx((1 - 2 * eps) / ((1 - rate) * tiny.VOCABULARY), rel=1e-5)
        assert seen == noised.tensors["input_ids"][row, place]
    assert len(rate_at) == before.tensors["trained"].sum() == noised.weights[POLICY]
    documents_of = before.tensors["document_ids"]
    for (row, place), rate in rate_at.items():
        assert eps <= rate <= 1 - eps
        assert all(
            rate == other
            for (of, at), other in rate_at.items()
            if of == row and documents_of[of, at] == documents_of[row, place]
        )

    def plain(logits: Tensor, row: int, place: int) -> Tensor:
        rate, vocabulary = rate_at[row, place], tiny.VOCABULARY
        seen, target = int(noised.tensors["input_ids"][row, place]), int(before.tensors["input_ids"][row, place])
        chances = torch.full((vocabulary, vocabulary), rate / vocabulary, dtype=torch.float64)  # p(y | x0)
        chances.fill_diagonal_(1 - rate + rate / vocabulary)
        joint = logits.double().softmax(0) * chances[seen]
        scores = (chances / chances[seen]) @ (joint / joint.sum())
        ratios = chances[:, target] / chances[seen, target]
        terms = scores - ratios * scores.log() + ratios * (ratios.log() - 1)
        total = terms.sum() - terms[seen]
        return (total * (1 - 2 * eps) / ((1 - rate) * vocabulary)).float()

    theirs = scores_of(model, before, noised.tensors["input_ids"], plain, shift=shift)
    assert_same_training(model, process.loss(model, noised).sums[POLICY], theirs, 1e-5, of_gradients=5e-5)


def test_uniform_noise_draws_any_token() -> None:
    """At a rate p a token is drawn anew from all V, itself among them, each as likely; prompts stay."""
    num, length = 400, 101
    process = score_entropy("uniform", num)
    before = micro_of([documents([length], prompt=20)] * num, length)
    noised = process.noised(0, before)
    ids, trained = noised.tensors["input_ids"], before.tensors["trained"]
    assert torch.equal(ids[~trained], before.tensors["input_ids"][~trained])
    rates = noised.tensors["rates"].view(num, -1)
    changed = (ids != before.tensors["input_ids"])[trained].view(num, -1).double()
    expected = rates[:, 0] * (1 - 1 / tiny.VOCABULARY)
    z = (changed.mean(1) - expected) / (expected * (1 - expected) / changed.shape[1]).sqrt()
    assert z[(rates[:, 0] > 0.05) & (rates[:, 0] < 0.95)].abs().max() < 5
    drawn = torch.bincount(ids[trained][changed.flatten() > 0], minlength=tiny.VOCABULARY).double()
    assert ((drawn - drawn.mean()).abs() < 5 * drawn.mean().sqrt()).all()


def test_held_out_figures_add_what_is_left_at_both_ends() -> None:
    model, before, eps = decoder(), micro_of(ROWS, LENGTH), 0.01
    with torch.no_grad():
        for noise in ("absorbing", "uniform"):
            process = score_entropy(noise, eps=eps)
            held_out = process.held_out(before, 3)
            rest = process.nats(model, held_out) - process.loss(model, held_out).sums[POLICY]
            if noise == "absorbing":
                assert rest == 0
                continue
            num = held_out.weights[POLICY]
            last = num * divergence_from_uniform(eps, tiny.VOCABULARY)
            # At the first rate few tokens were changed, of which the model knows nothing: about log(V / eps) for each.
            changed = (held_out.tensors["least_seen"] != held_out.tensors["targets"]).sum().item()
            first = (rest - last).item()
            assert changed * math.log(1 / eps) < first < changed * math.log(tiny.VOCABULARY**2 / eps) + 2 * num * eps
            assert process.nats(model, held_out) == process.nats(model, process.held_out(before, 3))


def test_held_out_figures_of_uniform_noise_are_those_of_evaluation() -> None:
    """The same bound: noise is drawn otherwise, so that many texts are asked for."""
    num, length = 60, 20
    model = decoder()
    process, rows = score_entropy("uniform", num), [documents([length], seed=seed) for seed in range(num)]
    before = micro_of(rows, length)
    with torch.no_grad():
        ours = [
            (process.nats(model, held_out) / held_out.weights[POLICY]).item()
            for held_out in [score_entropy("uniform", num).held_out(before, num)]
        ]
    draw = uniform_bound(model, Diffusion("uniform", None, False), tiny.VOCABULARY, "cpu")
    theirs = bound(draw, rows_of(before, None, shift=False), 4)
    error = math.sqrt(theirs.variances.sum() * 4) / before.tensors["trained"].sum().item()
    assert abs(ours[0] - theirs.nats.sum() / before.tensors["trained"].sum().item()) < 4 * error
