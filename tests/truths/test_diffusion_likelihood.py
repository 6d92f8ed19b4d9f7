"""What the likelihood of a diffusion model has to be, on models so small that every text and mask can be counted.

Each truth is computed twice: by the definition, from a table of conditional probabilities, and by llmtrain's
estimators through the forwards that they really make (one row, or the noisy and clean copies of block diffusion).
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmtrain.algorithms.masking import Rows, exact_count
from llmtrain.data.packing import PADDING
from llmtrain.evaluation.likelihood import (
    Order,
    bound,
    combined,
    levels,
    masked_bound,
    replay,
    uniform_bound,
    units_of,
)
from llmtrain.models.attention import Visible, block_causal, both, within
from llmtrain.models.diffusion import Diffusion
from tests.tables import (
    ALL,
    FORMS,
    MASK,
    TEXTS,
    WORDS,
    L,
    V,
    any_answers,
    by_definition,
    by_table,
    conditionals,
    enumerated,
    form,
    logp_after,
    nats,
    of_model,
    of_real,
    real,
    rows_of,
    some_distribution,
)

# -------------------------------------------------------------------------------------- truths


@pytest.mark.parametrize(("block_size", "shift"), FORMS)
def test_1_l_of_l_is_the_mean_over_all_orders(block_size: int | None, shift: bool) -> None:
    table = any_answers()
    predict, first = form(table, block_size, shift)
    for text in TEXTS[::20]:
        assert enumerated(predict, text, block_size, first) == pytest.approx(
            by_definition(table, text, block_size, shift), rel=1e-5
        )


@pytest.mark.parametrize(("block_size", "shift"), FORMS)
def test_draws_are_unbiased_and_know_their_error(block_size: int | None, shift: bool) -> None:
    table = any_answers(1)
    predict, first = form(table, block_size, shift)
    text, num = TEXTS[37], 400
    for samples in (1, 5, 8):
        estimate = bound(masked_bound(predict, block_size), rows_of([text] * num, first), samples)
        spread = estimate.nats.std(ddof=1)
        truth = by_definition(table, text, block_size, shift)
        assert abs(estimate.nats.mean() - truth) < 4 * spread / math.sqrt(num) + 1e-5
        if samples > 1:
            assert math.sqrt(estimate.variances.mean()) == pytest.approx(spread, rel=0.15, abs=1e-5)


def test_draws_in_strata_err_less() -> None:
    predict = of_model(by_table(any_answers(1)), MASK)
    rows = rows_of([TEXTS[37]] * 400)
    together = bound(masked_bound(predict, None), rows, 8).nats
    alone = bound(masked_bound(predict, None), rows, 1).nats
    assert together.var() < 0.9 * alone.var() / 8


def test_2_the_integral_over_rates_is_the_same() -> None:
    table = any_answers(2)
    predict = of_model(by_table(table), MASK)
    nodes, weights = np.polynomial.legendre.leggauss(L)  # exact: the integrand is a polynomial of degree L - 1
    for text in TEXTS[::25]:
        integral = 0.0
        for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            for num in range(1, L + 1):
                for chosen in itertools.combinations(range(L), num):
                    rest = [i for i in range(L) if i not in chosen]
                    loss = sum(nats(table, text, rest, i) for i in chosen) / t
                    integral += weight * t**num * (1 - t) ** (L - num) * loss
        assert enumerated(predict, text, None) == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("block_size", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_3_the_bound_is_one(block_size: int | None, seed: int) -> None:
    predict, _ = form(any_answers(seed), block_size, shift=False)
    total = sum(math.exp(-enumerated(predict, text, block_size)) for text in TEXTS)
    assert total <= 1 + 1e-6
    assert total == pytest.approx(1, abs=1e-5) if block_size == 1 else total < 0.999


@pytest.mark.parametrize(("block_size", "shift"), FORMS)
def test_4_a_uniform_model_has_no_variance(block_size: int | None, shift: bool) -> None:
    predict, first = form(torch.zeros_like(any_answers()), block_size, shift)
    estimate = bound(masked_bound(predict, block_size), rows_of(TEXTS, first), 6)
    np.testing.assert_allclose(estimate.nats, (L - first) * math.log(V), rtol=1e-6)
    np.testing.assert_allclose(estimate.variances, 0, atol=1e-10)


# Without those forms in which a row predicts a block's first token and does not see what is known in the block.
SEEING = [form for form in FORMS if form.values != (2, True)]


@pytest.mark.parametrize(("block_size", "shift"), SEEING)
def test_5_exact_conditionals_give_the_likelihood(block_size: int | None, shift: bool) -> None:
    p = some_distribution()
    predict, first = form(conditionals(p), block_size, shift)
    found = [enumerated(predict, text, block_size, first) for text in TEXTS]
    np.testing.assert_allclose(found, -logp_after(p, first), atol=2e-5)


def test_5_of_packed_and_padded_rows() -> None:
    """Texts of other lengths: the likelihood of a shorter one is a marginal."""
    p = some_distribution()
    for block_size, shift in ((None, False), (None, True), (2, False), (3, True)):
        predict, first = form(conditionals(p), block_size, shift)
        lengths, text = (L, 2, 3), np.asarray([2, 0, 1, 1])
        place = np.concatenate([np.arange(n) for n in (*lengths, 2)])
        document = np.repeat([0, 1, 2, PADDING], (*lengths, 2))
        ids = np.concatenate([*(text[:n] for n in lengths), [0, 0]])
        many = 3000
        ids, place, document = (np.tile(array, (many, 1)) for array in (ids, place, document))
        rows = Rows(ids, place, document, (place >= first) & (document != PADDING), np.arange(many))
        estimate = bound(masked_bound(predict, block_size), rows, 2)
        truth = 0.0
        for n in lengths:
            given = p[tuple(text[:first])].sum().log() if first else 0.0
            truth -= float(p[tuple(text[:n])].sum().log() - given)
        error = math.sqrt(estimate.variances.mean() / many)
        assert abs(estimate.nats.mean() - truth) < 4 * error
        assert error < 0.1


# ------------------------------------------------------------------------------- real decoders


@pytest.mark.parametrize("shift", [False, True])
def test_6_blocks_of_one_token_are_autoregressive(shift: bool) -> None:
    predict = of_real(1, shift)
    estimate = bound(masked_bound(predict, 1), rows_of(ALL, 1), 1)
    assert np.exp(-estimate.nats).sum() == pytest.approx(1, abs=1e-5)
    hf = real().hf
    for text, found in list(zip(ALL, estimate.nats, strict=True))[::9]:
        nll = 0.0
        for place in range(1, 4):
            ids = torch.tensor([[*text[:place], *([] if shift else [WORDS - 1])]])
            with torch.no_grad():
                logits = hf(ids).logits[0, -1, : WORDS - 1]
            nll -= float(logits.log_softmax(0)[text[place]])
        assert found == pytest.approx(nll, abs=1e-5)
    rows = rows_of(ALL, 1)
    alone = np.zeros(ALL.shape, bool)
    alone[:, 2] = True
    together = predict(rows, rows.trained).logprobs.view(-1, 3)[:, 1]
    torch.testing.assert_close(predict(rows, alone).logprobs, together)


@pytest.mark.parametrize("shift", [False, True])
def test_7_one_block_is_masked_diffusion(shift: bool) -> None:
    rows = rows_of(ALL, 1)
    whole, masked = masked_bound(of_real(7, shift), 7), masked_bound(of_real(None, shift), None)
    np.testing.assert_allclose(bound(whole, rows, 6).nats, bound(masked, rows, 6).nats, atol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [None, 2, 3])
def test_3_of_real_decoders(block_size: int | None, shift: bool) -> None:
    predict = of_real(block_size, shift)
    total = sum(math.exp(-enumerated(predict, text, block_size, 1)) for text in ALL)
    assert 0 < total < 1


@pytest.mark.parametrize("shift", [False, True])
def test_all_blocks_at_once_are_as_block_after_block(shift: bool) -> None:
    size, decoder, random = 3, real(), np.random.default_rng(0)
    ids = random.integers(0, WORDS - 1, (4, 8))
    rows = rows_of(ids, 1)
    masked = rows.trained & (random.random(ids.shape) < 0.6)
    found = of_real(size, shift)(rows, masked).logprobs
    slow = []
    for row, start in itertools.product(range(len(ids)), range(0, 8, size)):
        end = min(start + size, 8)
        noisy = torch.tensor([[*ids[row, :start], *np.where(masked, WORDS - 1, ids)[row, start:end]]])
        place = torch.arange(end)[None]
        visible = both(within(torch.zeros_like(place)), block_causal(place // size))
        with torch.no_grad():
            logits = decoder(noisy, place, lambda hidden, head: head(hidden), visible)[0, :, : WORDS - 1]
        for column in np.flatnonzero(masked[row, start:end]) + start:
            slow.append(logits[column - int(shift)].log_softmax(0)[ids[row, column]])
    torch.testing.assert_close(found, torch.stack(slow), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [None, 3])
def test_packing_and_padding_change_nothing(block_size: int | None, shift: bool) -> None:
    random = np.random.default_rng(1)
    predict, lengths = of_real(block_size, shift), (7, 4, 5)
    documents = [random.integers(0, WORDS - 1, n) for n in lengths]
    holes = [(np.arange(n) > 0) & (random.random(n) < 0.7) for n in lengths]
    alone = torch.cat(
        [predict(rows_of([ids], 1), hole[None]).logprobs for ids, hole in zip(documents, holes, strict=True)]
    )
    place = np.concatenate([np.arange(n) for n in (*lengths, 4)])[None]
    document = np.repeat([0, 1, 2, PADDING], (*lengths, 4))[None]
    packed = np.concatenate([*documents, np.zeros(4, np.int64)])[None]
    hole = np.concatenate([*holes, np.zeros(4, bool)])[None]
    rows = Rows(packed, place, document, hole, np.zeros(1, np.int64))
    torch.testing.assert_close(predict(rows, hole).logprobs, alone, atol=1e-4, rtol=1e-4)
    for order in (Order(), Order(steps=3), Order(tokens_per_step=2, block_length=None if block_size else 3)):
        each = [
            replay(predict, rows_of([ids], 1)._replace(trained=hole[None]), block_size, order)
            for ids, hole in zip(documents, holes, strict=True)
        ]
        np.testing.assert_allclose(replay(predict, rows, block_size, order), sum(each), rtol=1e-4)


# -------------------------------------------------------------------------------------- noise


def chi_square(counts: Any) -> float:
    """How far off equal counts are, in standard deviations of the statistic."""
    counts = np.asarray(counts, dtype=float)
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(("length", "samples"), [(7, 1), (7, 3), (7, 5), (9, 6), (8, 8), (5, 16), (2, 3)])
def test_13_l_and_its_sets_are_uniform(length: int, samples: int) -> None:
    keys = np.repeat(np.arange(3000), samples)
    draws = np.tile(np.arange(samples), 3000)
    t = levels(3, keys, draws, samples, 1)
    rows = rows_of(np.zeros((len(keys), length)), keys=keys * samples + draws)
    masked = exact_count(3, rows, units_of(rows, None), t).masked
    nums = masked.sum(1)
    weight = np.full(samples, 1.0)
    if samples > 1:  # strata of three draws count as much as those of two
        which = np.arange(samples) % (samples // 2)
        weight = samples / (samples // 2) / np.bincount(which)[which]
    shares = np.bincount(nums - 1, weights=weight[draws], minlength=length)
    assert chi_square(shares) < 5
    for num in range(1, length):
        of_num = masked[nums == num]
        assert chi_square(of_num.sum(0)) < 5, "some places are masked more often than others"


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_13_levels_of_blocks_are_uniform(samples: int) -> None:
    keys = np.repeat(np.arange(4000), samples)
    draws = np.tile(np.arange(samples), 4000)
    t = levels(0, keys, draws, samples, 6)
    assert t.min() >= 0 and t.max() < 1
    which = np.arange(samples) % max(1, samples // 2)
    for block in range(6):
        once = t[np.isin(draws, [np.flatnonzero(which == s)[0] for s in np.unique(which)]), block]
        assert chi_square(np.histogram(once, bins=7, range=(0, 1))[0]) < 5
    assert abs(np.corrcoef(t[draws == 0, 0], t[draws == 0, 1])[0, 1]) < 0.08  # each block has a level of its own


def rounded(length: int, samples: int, start: int) -> list[int]:
    """The l of a batch as evenly spaced numbers rounded to whole ones, halves to even."""
    spaced = torch.round(torch.linspace(start, start + (samples - 1) * (length / samples), steps=samples)).long()
    return ((spaced - 1) % length + 1).tolist()


def test_rounding_is_the_trap_that_strata_are_not() -> None:
    """A model that knows nothing of a text with an odd number of masks, and much of one with an even number."""
    length, samples = 6, 4  # steps of 1.5: every second number is a half, and is rounded to an even one

    def model(ids: Tensor) -> Tensor:
        odd = (ids == 2).sum(1, keepdim=True) % 2
        logits = torch.zeros(*ids.shape, 3)
        logits[..., 0] = torch.where(odd.bool(), 0.0, 3.0)
        return logits

    rows = rows_of(np.zeros((3000, length)))
    known = [length * math.log1p(math.exp(0.0 if num % 2 else -3.0)) for num in range(1, length + 1)]
    truth = sum(known) / length
    biased = np.mean([known[num - 1] for start in range(1, length + 1) for num in rounded(length, samples, start)])
    estimate = bound(masked_bound(of_model(model, 2), None), rows, samples)
    error = estimate.nats.std() / math.sqrt(len(estimate.nats))
    assert abs(estimate.nats.mean() - truth) < 4 * error
    assert abs(biased - truth) > 20 * error, "the trap is not seen here"


def test_the_variance_is_that_of_strata() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(size=(20000, 5)) * [1, 3, 1, 3, 1]  # strata 0 1 0 1 0
    estimate = combined(draws)
    assert estimate.nats.var() == pytest.approx((1 / 3 + 9 / 2) / 4, rel=0.05)
    assert estimate.variances.mean() == pytest.approx((1 / 3 + 9 / 2) / 4, rel=0.05)


# ----------------------------------------------------------------------------- uniform noise


class Prior(nn.Module):
    """Knows how frequent a token is: all there is to know of texts of one token."""

    def __init__(self, p: Tensor):
        super().__init__()
        self._logits, self._head = p.log(), nn.Linear(V, V, bias=False)
        with torch.no_grad():
            self._head.weight.copy_(torch.eye(V))

    def forward(self, input_ids: Tensor, position_ids: Tensor, head: Any, visible: Visible) -> Tensor:
        hidden: Tensor = head(self._logits.expand(*input_ids.shape, V), self._head)
        return hidden


def test_the_bound_of_uniform_noise_is_the_likelihood_of_exact_conditionals() -> None:
    p = torch.tensor([0.7, 0.25, 0.05])
    draw = uniform_bound(Prior(p), Diffusion("uniform", None, False), V, "cpu")
    for token in range(V):
        estimate = bound(draw, rows_of([[token]] * 4000), 8)
        error = math.sqrt(estimate.variances.mean() / 4000)
        assert abs(estimate.nats.mean() + math.log(p[token])) < 4 * error
        assert error < 0.05
