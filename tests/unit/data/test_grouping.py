"""Grouping by length moves rows inside an epoch, keeps batches alike, and has no state."""

import numpy as np
import pytest

from llmtrain.data.grouping import GLOBAL_BATCHES_IN_A_BLOCK, LengthGroupedOrder, lengths_of
from llmtrain.data.order import MixtureOrder, ShuffledOrder
from llmtrain.data.packing import Row, Rows

SEQUENCES = 4


class RowsOfLengths:
    """Rows of which only the lengths are asked for."""

    ragged = True

    def __init__(self, lengths: np.ndarray):
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Row:
        raise AssertionError("grouping reads no tokens")

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._lengths[indices]
        return found


def sources(*sizes: int) -> list[Rows]:
    chooser = np.random.default_rng(0)
    return [RowsOfLengths(chooser.integers(2, 1000, size)) for size in sizes]


def grouped(rows: list[Rows], seed: int = 1) -> LengthGroupedOrder:
    return LengthGroupedOrder(ShuffledOrder([len(source) for source in rows], seed), rows, SEQUENCES, seed)


def pairs(order: LengthGroupedOrder | ShuffledOrder | MixtureOrder, first: int, last: int) -> list[tuple[int, int]]:
    source, row = order.rows_at(np.arange(first, last))
    return list(zip(source.tolist(), row.tolist(), strict=True))


# Fewer rows than a global batch; not a multiple of it; one block, several, and a whole number of them.
@pytest.mark.parametrize("num", [3, 13, 250, 256, 257, 700, 1024])
def test_each_epoch_visits_each_row_once(num: int) -> None:
    rows = sources(num - num // 3, num // 3)
    order = grouped(rows)
    everything = sorted((source, row) for source, part in enumerate(rows) for row in range(len(part)))
    epochs = [pairs(order, epoch * num, epoch * num + num) for epoch in range(5)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    # An epoch within one global batch has but one order by length.
    assert len({tuple(epoch) for epoch in epochs}) == (5 if num > SEQUENCES else 1)


def test_any_access_pattern_gives_the_same() -> None:
    order = grouped(sources(500, 113))
    whole = pairs(order, 0, 3000)
    assert [pair for first in range(0, 3000, 7) for pair in pairs(order, first, min(first + 7, 3000))] == whole
    for position in (2999, 0, 612, 613, 1500):  # as a resumed run would, and with nothing remembered
        assert pairs(grouped(sources(500, 113)), position, position + 1) == [whole[position]]
    backwards = order.rows_at(np.arange(3000)[::-1])
    assert list(zip(*(values.tolist() for values in backwards), strict=True)) == whole[::-1]


def test_rows_of_a_global_batch_are_alike() -> None:
    num = 3 * GLOBAL_BATCHES_IN_A_BLOCK * SEQUENCES
    rows = sources(num)
    order = grouped(rows)

    def padding_share(order: LengthGroupedOrder | ShuffledOrder) -> float:
        lengths = lengths_of(rows, *order.rows_at(np.arange(num))).reshape(-1, SEQUENCES)
        return 1 - float(lengths.sum() / (lengths.max(axis=1) * SEQUENCES).sum())

    assert padding_share(ShuffledOrder([num], 1)) > 0.3
    assert padding_share(order) < 0.03
    # And the batches come in no order of length.
    means = lengths_of(rows, *order.rows_at(np.arange(num))).reshape(-1, SEQUENCES).mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


def test_a_mixture_keeps_its_shares_in_each_block() -> None:
    rows = sources(100, 900)
    mixture = MixtureOrder([100, 900], [1.0, 1.0], 1)
    order = LengthGroupedOrder(mixture, rows, SEQUENCES, 1)
    size = GLOBAL_BATCHES_IN_A_BLOCK * SEQUENCES
    for block in range(5):
        found = pairs(order, block * size, block * size + size)
        assert sorted(found) == sorted(pairs(mixture, block * size, block * size + size))


def test_seeds_give_different_orders() -> None:
    rows = sources(700)
    assert pairs(grouped(rows, 0), 0, 700) != pairs(grouped(rows, 1), 0, 700)
