"""The data order: permutations, epochs, shares, and no state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.order import MixtureOrder, Order, ShuffledOrder, cycle_counts, permutation_index, tempered


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 4099, 65536, 65537])
def test_it_is_a_permutation(n: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (2**64 - 1, 10**12)):
        assert np.array_equal(np.sort(permutation_index(np.arange(n), n, seed, epoch)), np.arange(n))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.data())
def test_large_ranges(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=20, unique=True))
    found = permutation_index(np.array(indices, np.int64), n, seed, epoch)
    assert len(set(found.tolist())) == len(indices)
    assert all(0 <= value < n for value in found)
    for index, value in zip(indices, found, strict=True):
        assert permutation_index(index, n, seed, epoch) == value


def test_epochs_may_differ_within_an_array() -> None:
    index, epoch = np.meshgrid(np.arange(10), np.arange(5))
    found = permutation_index(index, 10, 3, epoch)
    assert found.shape == (5, 10)
    for number in range(5):
        assert np.array_equal(found[number], permutation_index(np.arange(10), 10, 3, number))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_equally_likely(n: int) -> None:
    num = 6000
    found = permutation_index(np.tile(np.arange(n), (num, 1)), n, 0, np.arange(num)[:, None])
    _, counts = np.unique(found, axis=0, return_counts=True)
    expected = num / {2: 2, 3: 6, 4: 24}[n]
    assert len(counts) == num / expected
    # 99.9 % points of chi-square at 1, 5 and 23 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < {2: 10.8, 3: 20.5, 4: 49.7}[n]


@pytest.mark.parametrize("n", [5, 7, 16, 20])
@pytest.mark.parametrize("by", ["seed", "epoch"])
def test_positions_and_neighbours_are_uniform(n: int, by: str) -> None:
    num = 4000
    if by == "epoch":
        found = permutation_index(np.tile(np.arange(n), (num, 1)), n, 0, np.arange(num)[:, None])
    else:
        found = np.stack([permutation_index(np.arange(n), n, seed, 0) for seed in range(num)])
    for column in (0, n // 2, n - 1):
        _check_uniform(found[:, column], n)
    # Of the n - 1 differences of two neighbours each is equally likely.
    _check_uniform((found[:, 1] - found[:, 0]) % n - 1, n - 1)


def _check_uniform(values: np.ndarray, n: int) -> None:
    counts = np.bincount(values, minlength=n)
    expected = len(values) / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = n - 1
    # Wilson and Hilferty's approximation of the 99.99 % point: sixteen such tests run here.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_the_permutation_is_pinned() -> None:
    """A change here would change the data order of runs that are resumed."""
    assert permutation_index(np.arange(10), 10, 1, 2).tolist() == [5, 6, 1, 8, 3, 0, 9, 2, 7, 4]
    assert permutation_index(np.arange(3) + 10**12, 10**13, 1, 2).tolist() == [
        1511533962896,
        743792507731,
        2033555658749,
    ]


def pairs(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    source, row = order.rows_at(np.arange(first, last))
    return list(zip(source.tolist(), row.tolist(), strict=True))


def test_each_epoch_visits_each_row_once() -> None:
    order = ShuffledOrder([3, 1, 7], seed=5)
    everything = sorted((source, row) for source, length in enumerate([3, 1, 7]) for row in range(length))
    epochs = [pairs(order, epoch * 11, epoch * 11 + 11) for epoch in range(20)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_seeds_give_different_orders() -> None:
    assert pairs(ShuffledOrder([1000], 0), 0, 1000) != pairs(ShuffledOrder([1000], 1), 0, 1000)
    mixtures = [MixtureOrder([1000, 500], [1.0, 2.0], seed) for seed in (0, 1)]
    assert pairs(mixtures[0], 0, 1000) != pairs(mixtures[1], 0, 1000)


@pytest.mark.parametrize("order", [ShuffledOrder([30, 12], 1), MixtureOrder([30, 12], [1.0, 3.0], 1)])
def test_any_access_pattern_gives_the_same(order: Order) -> None:
    whole = pairs(order, 0, 3000)
    assert [pair for first in range(0, 3000, 7) for pair in pairs(order, first, min(first + 7, 3000))] == whole
    backwards = order.rows_at(np.arange(3000)[::-1])
    assert list(zip(*(values.tolist() for values in backwards), strict=True)) == whole[::-1]
    assert [pairs(order, position, position + 1)[0] for position in (0, 999, 1000, 2999)] == [
        whole[position] for position in (0, 999, 1000, 2999)
    ]


def test_shares_are_exact_in_each_cycle() -> None:
    order = MixtureOrder([50, 2000, 10], [0.5, 0.3, 0.2], seed=1)
    assert order.counts == [500, 300, 200]
    cycles = [order.rows_at(np.arange(cycle * 1000, cycle * 1000 + 1000))[0] for cycle in range(5)]
    assert all(np.bincount(cycle).tolist() == [500, 300, 200] for cycle in cycles)
    assert not np.array_equal(cycles[0], cycles[1])


def test_each_source_of_a_mixture_has_epochs_of_its_own() -> None:
    lengths, weights = [50, 300, 7], [0.5, 0.3, 0.2]
    source, row = MixtureOrder(lengths, weights, seed=1).rows_at(np.arange(21_000))
    for number, (length, num) in enumerate(zip(lengths, (10_500, 6300, 4200), strict=True)):
        rows = row[source == number]
        assert len(rows) == num and num % length == 0
        # In 21 whole cycles each source gives its rows a whole number of times.
        assert np.bincount(rows).tolist() == [num // length] * length
    # A source that is exactly used up in one cycle gives each row once in each.
    source, row = MixtureOrder([500, 9], [1.0, 1.0], seed=1).rows_at(np.arange(3000))
    for cycle in range(3):
        part = slice(cycle * 1000, cycle * 1000 + 1000)
        assert sorted(row[part][source[part] == 0]) == list(range(500))


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=8))
def test_counts_by_largest_remainder(weights: list[float]) -> None:
    counts = cycle_counts(weights)
    size = sum(counts)
    assert size >= 1000 and min(counts) >= 9
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - size * weight / sum(weights)) < 1


def test_a_small_share_makes_the_cycle_longer() -> None:
    assert cycle_counts([1.0, 1.0]) == [500, 500]
    assert cycle_counts([1.0, 1.0, 1.0]) == [334, 333, 333]
    assert cycle_counts([9999.0, 1.0]) == [99_990, 10]


def test_only_the_ratios_of_weights_count() -> None:
    assert cycle_counts([1e308, 1e308]) == cycle_counts([5e-324, 5e-324]) == [500, 500]


def test_temperature_evens_out_the_shares() -> None:
    rows = [8000, 1000]
    assert cycle_counts(tempered(rows, 1.0)) == cycle_counts([8.0, 1.0])  # their own shares
    assert tempered(rows, 3.0) == pytest.approx([1.0, 0.5])  # the cube root of an eighth
    assert tempered(rows, 0.5) == pytest.approx([1.0, 1 / 64])
    assert tempered(rows, 1e9) == pytest.approx([1.0, 1.0])
