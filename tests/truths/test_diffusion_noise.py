"""Which tokens diffusion masks: uniform noise levels, unbiased estimates, the same noise on any layout."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.algorithms.building import Process
from llmtrain.algorithms.masking import stratified
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.cache import TokenCorpus
from llmtrain.data.loader import Loader
from llmtrain.data.order import ShuffledOrder
from llmtrain.data.packing import PackedRows, PlannedRows, Rows
from llmtrain.data.row_plan import PlanSettings, plan_rows
from tests.noise import (
    LENGTH,
    MASK,
    PAD,
    PROCESSES,
    ROWS,
    Document,
    block,
    decoder,
    documents,
    masked,
    masked_in,
    masked_loss,
    micro_of,
    spans_of,
)


def chi_square(counts: Tensor | np.ndarray, expected: Any) -> float:
    """How many standard deviations the statistic is above its mean."""
    counts, expected = np.asarray(counts, np.float64), np.broadcast_to(np.asarray(expected, np.float64), len(counts))
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


def long_rows(num: int, length: int, first: int = 0) -> MicroBatch:
    """One document a row."""
    return micro_of([documents([length], seed=7)] * num, length, first)


def rates_and_shares(process: Process, before: MicroBatch, size: int) -> tuple[Tensor, Tensor]:
    """Of each unit of `size` tokens after the first: the rate that its weights tell, and the share that is masked."""
    noised = process.noised(int(before.tensors["positions"][0]) // before.tensors["input_ids"].shape[0], before)
    num_rows, length = before.tensors["input_ids"].shape
    weights = torch.zeros(num_rows, length, dtype=torch.float64)
    heads = noised.tensors["heads"]
    width = noised.tensors["input_ids"].shape[1]
    weights[heads // width, heads % width] = noised.tensors["row_weights"].double()
    units = weights[:, 1:].reshape(num_rows, -1, size)
    largest = units.max(2, keepdim=True).values
    assert ((units == 0) | (units == largest)).all(), "all tokens of a unit have its rate"
    return 1 / largest[..., 0], (units > 0).double().mean(2)


def test_tokens_are_masked_at_their_documents_rate() -> None:
    """The rate is uniform from eps to 1, and each token's draw its own."""
    num, length = 512, 401
    rates, shares = rates_and_shares(masked(num, eps=0.05), long_rows(num, length), length - 1)
    rates, shares = rates[:, 0], shares[:, 0]
    assert rates.min() >= 0.05 and rates.max() <= 1
    errors = (shares - rates) / (rates * (1 - rates) / (length - 1)).clamp_min(1e-9).sqrt()
    assert errors.abs().max() < 5 and 0.8 < errors.std() < 1.2  # of a binomial, no less and no more
    assert abs(chi_square(torch.histc(rates, 16, 0.05, 1.0), num / 16)) < 5


def test_blocks_have_rates_of_their_own() -> None:
    num, size = 64, 100
    for clip, (low, high) in ((None, (1e-3, 1.0)), ([0.3, 0.8], (0.3, 0.8)), ([0.0, 0.5], (1e-3, 0.5))):
        # Blocks are cut from the start of the document, whose first token is in none of these.
        process = block(num, length=801, block_size=size, clip=clip)
        noised = process.noised(0, long_rows(num, 801))
        heads = noised.tensors["heads"]
        rates: dict[tuple[int, int], float] = {}
        masked_tokens: dict[tuple[int, int], int] = {}
        for head, weight in zip(heads.tolist(), noised.tensors["row_weights"].tolist(), strict=True):
            unit = head // 1602, (head % 1602) // size
            assert rates.setdefault(unit, 1 / weight) == 1 / weight
            masked_tokens[unit] = masked_tokens.get(unit, 0) + 1
        whole = {unit: rate for unit, rate in rates.items() if 1 <= unit[1] <= 7}
        assert all(low * 0.999 <= rate <= high * 1.001 for rate in rates.values())
        assert len(set(whole.values())) == len(whole) > 0.9 * num * 7
        z = [
            (masked_tokens[unit] - size * rate) / math.sqrt(size * rate * (1 - rate))
            for unit, rate in whole.items()
            if 0.05 < rate < 0.95
        ]
        assert max(map(abs, z)) < 5 and 0.9 < np.std(z) < 1.1


@pytest.mark.parametrize("units_a_row", [1, 6])
def test_noise_levels_are_uniform_and_spread_over_the_global_batch(units_a_row: int) -> None:
    """For every row and every unit of it over the steps, and for the units of a step together."""
    sequences, steps, most = 8, 2000, units_a_row + 2
    t = np.stack(
        [
            stratified(3, np.arange(step * sequences, (step + 1) * sequences), sequences, most, units_a_row)
            for step in range(steps)
        ]
    )  # [steps, rows, units]
    assert t.shape == (steps, sequences, most) and t.min() >= 0 and t.max() < 1
    for row, unit in itertools.product(range(sequences), range(most)):
        counts = np.histogram(t[:, row, unit], bins=20, range=(0, 1))[0]
        assert chi_square(counts, steps / 20) < 5, (row, unit)
    num = sequences * units_a_row
    for step in range(0, steps, 97):
        gaps = np.diff(np.sort(t[step, :, :units_a_row].ravel()))
        np.testing.assert_allclose(gaps, 1 / num, atol=1e-9)
    # Two units of a step are no function of each other's place: no order of noise within a row or a batch.
    firsts, lasts = t[:, :, 0], t[:, :, units_a_row - 1]
    if units_a_row > 1:
        assert abs((firsts < lasts).mean() - 0.5) < 5 * 0.5 / math.sqrt(steps * sequences)
        ranks = np.argsort(np.argsort(t[:, 0, :units_a_row], axis=1), axis=1)
        assert np.abs(ranks.mean(0) - (units_a_row - 1) / 2).max() < 0.15


def test_early_blocks_get_no_less_noise() -> None:
    """The trap of strata in the order of the blocks, at one row a micro-batch."""
    process, masked_tokens = block(4, length=33, block_size=4), np.zeros(33)
    steps = 400
    for step in range(steps):
        for row in range(4):
            noised = process.noised(step, long_rows(1, 33, first=4 * step + row))
            masked_tokens[noised.tensors["heads"].numpy()] += 1
    shares = masked_tokens[1:] / (steps * 4)
    assert np.abs(shares - 0.5).max() < 0.06  # of about 0.5 +- 0.01; the first block's would be 0.06


SIZE = 4  # trained tokens of the documents below
NATS = torch.rand(2**SIZE, SIZE, generator=torch.Generator().manual_seed(5)).double().numpy() * 5  # by set, by token


def estimates(noised: MicroBatch, num: int, view: int = 0) -> np.ndarray:
    """The loss of each row for a model whose -log p of token i is NATS[masked set, i]."""
    weights = np.zeros(noised.tensors["input_ids"].shape)
    weights.ravel()[noised.tensors["heads"].numpy()] = noised.tensors["row_weights"].double().numpy()
    of_view = weights[view * num : (view + 1) * num, 1 : SIZE + 1]
    sets = (of_view > 0) @ (1 << np.arange(SIZE))
    losses: np.ndarray = (of_view * NATS[sets]).sum(1)
    return losses


def expected_at(rate: float) -> float:
    """Of sum over masked of nats / rate."""
    total = 0.0
    for members in itertools.product((0, 1), repeat=SIZE):
        chance = math.prod(rate if member else 1 - rate for member in members)
        number = sum(member << place for place, member in enumerate(members))
        total += chance * sum(NATS[number, place] for place in range(SIZE) if members[place]) / rate
    return total


def integral(low: float, high: float) -> float:
    """The mean of `expected_at`, a polynomial of degree 3, over the rates: exact."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    return sum(w / 2 * expected_at(low + (high - low) * (x + 1) / 2) for x, w in zip(nodes, weights, strict=True))


def any_order() -> float:
    """The average over all orders of -log p of the tokens one after another, each seeing those before it."""
    orders = list(itertools.permutations(range(SIZE)))
    total = 0.0
    for order in orders:
        hidden = 2**SIZE - 1
        for place in order:
            total += NATS[hidden, place]
            hidden ^= 1 << place
    return total / len(orders)


def test_the_integral_is_the_any_order_likelihood() -> None:
    """Truth 2; and what l of L masked tokens with weight L / l come to, truth 1."""
    assert integral(0, 1) == pytest.approx(any_order(), rel=1e-12)
    exact = 0.0
    for number in range(1, SIZE + 1):
        for members in itertools.combinations(range(SIZE), number):
            chance = 1 / SIZE / math.comb(SIZE, number)
            hidden = sum(1 << place for place in members)
            exact += chance * SIZE / number * sum(NATS[hidden, place] for place in members)
    assert exact == pytest.approx(any_order(), rel=1e-12)


def test_estimates_are_unbiased_and_complementary_ones_vary_less() -> None:
    num, eps = 20_000, 1e-3
    before = long_rows(num, SIZE + 1)
    plain = estimates(masked(num).noised(0, before), num)
    assert abs(plain.mean() - integral(eps, 1)) < 4 * plain.std() / math.sqrt(num)

    noised = masked(num, complementary=True).noised(0, before)
    assert noised.weights == {POLICY: SIZE * num}
    views = estimates(noised, num, 0) + estimates(noised, num, 1)
    assert abs(views.mean() - integral(eps, 1 - eps)) < 4 * views.std() / math.sqrt(num)
    assert views.var() < plain.var() / 2  # less than two rows of the plain kind

    held_out = estimates(masked(num).held_out(before, num), num)
    assert abs(held_out.mean() - any_order()) < 4 * held_out.std() / math.sqrt(num)
    assert held_out.var() < plain.var()

    of_blocks = block(num, length=SIZE + 1, block_size=SIZE + 1)
    plain_of_blocks = estimates(of_blocks.noised(0, before), num)
    assert abs(plain_of_blocks.mean() - integral(eps, 1)) < 4 * plain_of_blocks.std() / math.sqrt(num)
    held_out_of_blocks = estimates(of_blocks.held_out(before, num), num)
    assert abs(held_out_of_blocks.mean() - any_order()) < 4 * held_out_of_blocks.std() / math.sqrt(num)


def test_complementary_views_mask_each_trained_token_once() -> None:
    before = micro_of(ROWS, LENGTH)
    noised = masked(complementary=True).noised(0, before)
    first, second = (masked_in(before, noised, shift=False, view=view) for view in (0, 1))
    for row, spans in enumerate(spans_of(before)):
        trained = set(before.tensors["trained"][row].nonzero()[:, 0].tolist())
        assert not set(first[row]) & set(second[row]) and set(first[row]) | set(second[row]) == trained
        for span in spans:
            ones = {first[row][place].weight * 2 for place in span if place in first[row]}
            others = {second[row][place].weight * 2 for place in span if place in second[row]}
            assert len(ones) <= 1 and len(others) <= 1
            if ones and others:
                assert 1 / ones.pop() + 1 / others.pop() == pytest.approx(1, rel=1e-5)


def test_exactly_l_of_a_units_tokens_are_masked_all_sets_alike() -> None:
    num = 30_000
    noised = masked(num).held_out(long_rows(num, SIZE + 1), num)
    ids = noised.tensors["input_ids"][:, 1:]
    sets = ((ids == MASK).long() @ (1 << torch.arange(SIZE))).numpy()
    counts = np.bincount(sets, minlength=2**SIZE)
    expected = [num / SIZE / math.comb(SIZE, members.bit_count()) if members else 0.0 for members in range(2**SIZE)]
    assert counts[0] == 0
    assert chi_square(counts[1:], expected[1:]) < 5
    sizes = (ids == MASK).sum(1)
    weights = noised.tensors["row_weights"]
    assert torch.equal(weights, (SIZE / sizes.double()).float().repeat_interleave(sizes))


def test_rows_are_cropped_to_random_lengths() -> None:
    num, length = 4000, 10
    process, plain = masked(num, random_length_share=0.3), masked(num)
    before = long_rows(num, length)
    noised = process.noised(0, before)
    lengths = (noised.tensors["document_ids"] >= 0).sum(1)
    chosen = lengths < length
    share = 0.3 * (length - 1) / length  # a tenth of the crops keep all
    assert abs(chosen.double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / num)
    counts = torch.bincount(lengths[chosen], minlength=length)[1:]
    assert chi_square(counts, int(chosen.sum()) / (length - 1)) < 5
    assert noised.weights[POLICY] == (lengths - 1).sum() and noised.num_tokens == lengths.sum()
    whole = plain.noised(0, before)
    model = decoder()
    for row in (int(chosen.nonzero()[0]), int((~chosen).nonzero()[0]), int((lengths == 3).nonzero()[0])):
        kept = int(lengths[row])
        ids = noised.tensors["input_ids"][row]
        assert torch.equal(ids[:kept], whole.tensors["input_ids"][row, :kept]) and (ids[kept:] == PAD).all()
        # One row alone is trained as the document that was cut there.
        one = process.noised(0, long_rows(1, length, first=row))
        short = micro_of([documents([length], seed=7)], length, first=row)
        masks = [
            {at: what for at, what in masked_in(short, plain.noised(0, short), shift=False)[0].items() if at < kept}
        ]
        whole_document = documents([length], seed=7)[0]
        cut = micro_of([[Document(whole_document.ids[:kept], whole_document.trained[:kept])]], kept)
        torch.testing.assert_close(
            process.loss(model, one).sums[POLICY], masked_loss(model, cut, masks), rtol=4e-6, atol=1e-6
        )


# The same noise, however the batch is split


def corpus() -> TokenCorpus:
    """Documents of 2 to 40 tokens, about half of whose tokens are trained."""
    chooser = np.random.default_rng(0)
    ends = np.cumsum(chooser.integers(2, 40, size=60))
    tokens = chooser.integers(3, MASK, ends[-1]).astype(np.uint16)
    trained = (chooser.random(ends[-1]) < 0.6).astype(np.uint8)
    return TokenCorpus(tokens, ends, 0, trained, np.arange(len(ends)))


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    made: dict[str, Rows] = {"documents": PackedRows(corpus(), LENGTH, PAD)}
    for packing in ("best_fit", "none"):
        settings = PlanSettings(packing, "split", LENGTH)
        plan = plan_rows(corpus(), "key", settings, tmp_path_factory.mktemp(packing))[0]
        made[packing] = PlannedRows(corpus(), plan, LENGTH, PAD, ragged=packing == "none")
    return made


SEQUENCES = 8


def noise_of(process: Process, rows: Rows, step: int, ranks: int, micro_sequences: int) -> dict[tuple[int, int], Any]:
    """What each row of a step becomes, by its position in the data order: tokens, and what is asked of them."""
    found: dict[tuple[int, int], Any] = {}
    for rank in range(ranks):
        loader = Loader([rows], ShuffledOrder([len(rows)], 0), SEQUENCES, micro_sequences, rank, ranks)
        for micro in loader.micro_batches(step):
            tensors = process.noised(step, micro).tensors
            positions = micro.tensors["positions"].tolist()
            num_rows, length = micro.tensors["input_ids"].shape
            width = tensors["input_ids"].shape[1]
            for number, row in enumerate(tensors["input_ids"]):
                num = int((micro.tensors["document_ids"][number % num_rows] >= 0).sum())
                view = number // num_rows
                # Of both halves, where there are two; without what pads a micro-batch of unequal rows.
                text = [row[half : half + num].tolist() for half in range(0, width, length)]
                found[positions[number % num_rows], view] = (text, [])
            asked = [tensors[name].tolist() for name in ("targets", "row_weights", "seen", "rates") if name in tensors]
            for head, *figures in zip(tensors["heads"].tolist(), *asked, strict=True):
                number, column = divmod(head, width)
                place = (column // length, column % length)
                found[positions[number % num_rows], number // num_rows][1].append((place, *figures))
    return found


@pytest.mark.parametrize("packing", ["documents", "best_fit", "none"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_noise_of_a_row_is_the_same_on_any_layout(name: str, packing: str, all_rows: dict[str, Rows]) -> None:
    rows = all_rows[packing]
    process = PROCESSES[name](SEQUENCES)
    for step in (0, 3):
        whole = noise_of(process, rows, step, 1, SEQUENCES)
        assert len(whole) == SEQUENCES * (2 if "complementary" in name else 1)
        for ranks, micro_sequences in ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)):
            assert noise_of(PROCESSES[name](SEQUENCES), rows, step, ranks, micro_sequences) == whole


@pytest.mark.parametrize("name", sorted(set(PROCESSES) - {"block of one"}))
def test_other_steps_other_rows_and_other_seeds_have_other_noise(name: str) -> None:
    document = documents([60])[0]

    def places(seed: int, first: int) -> list[int]:
        before = micro_of([[document]], 60, first=first)
        noised = PROCESSES[name](SEQUENCES, seed).noised(first // SEQUENCES, before)
        changed: list[int] = (
            (noised.tensors["input_ids"][0, :60] != before.tensors["input_ids"][0]).nonzero()[:, 0].tolist()
        )
        return changed

    firsts = [places(seed, first) for seed in (0, 1, 2) for first in (*range(8), 8, 80, 8_000_000_000)]
    assert len({tuple(changed) for changed in firsts}) > 0.9 * len(firsts)
    if name == "masked, cropped":
        return  # few tokens are left at a row's end, in every row
    # No row's is another's in part: what is masked at one place tells nothing of the next row.
    drawn = torch.zeros(400, 60)
    for first in range(400):
        drawn[first, places(0, first)] = 1
    centred = drawn[:, 1:] - drawn[:, 1:].mean(1, keepdim=True)
    for moved in range(-2, 3):
        products = (centred[1:] * centred[:-1].roll(moved, 1)).mean().item()
        assert abs(products) < 5 * 0.25 / math.sqrt(399 * 59), moved


def test_as_many_tokens_are_trained_as_in_autoregressive_training(all_rows: dict[str, Rows]) -> None:
    """So nats per token mean the same. A token that stands in no row, since nothing comes after it, is left out."""
    documents_of_a_row_and_one = sum(
        (length - 1) % LENGTH == 0 for length in np.diff(corpus().document_ends, prepend=0)
    )
    for packing, rows in all_rows.items():
        read = [rows[index] for index in range(len(rows))]
        num_targets = sum(int((row.targets != -100).sum()) for row in read)
        num_trained = sum(int(row.trained.sum()) for row in read)
        assert 0 <= num_targets - num_trained <= (1 if packing == "documents" else documents_of_a_row_and_one)
