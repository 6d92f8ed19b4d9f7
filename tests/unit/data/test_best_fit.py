"""Best-fit decreasing against its slow twin, and against first fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.best_fit import best_fit

CAPACITY = 32
lengths_of_pieces = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120)


def loads_of(rows: np.ndarray, lengths: list[int]) -> list[int]:
    loads: list[int] = np.bincount(rows, weights=lengths).astype(int).tolist()
    return loads


def best_fit_twin(lengths: list[int], capacity: int) -> list[int]:
    """Loads of the rows, piece by piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return [capacity - room for room in rooms]


def num_rows_of_first_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        for number, room in enumerate(rooms):
            if room >= length:
                rooms[number] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(lengths_of_pieces)
def test_it_is_its_twin(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths), CAPACITY)
    loads = loads_of(rows, lengths)
    assert len(rows) == len(lengths) and sum(loads) == sum(lengths)  # every piece once
    assert min(loads) > 0 and max(loads) <= CAPACITY  # no row is empty, none too full
    assert sorted(loads) == sorted(best_fit_twin(lengths, CAPACITY))


@given(lengths_of_pieces)
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(loads_of(best_fit(np.array(lengths), CAPACITY), lengths))
    assert len(loads) < 2 or loads[0] + loads[1] > CAPACITY


@pytest.mark.parametrize("seed", range(5))
def test_it_is_no_worse_than_first_fit(seed: int) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(5, 1, 2000).astype(int), 1, 1024)
    rows = best_fit(lengths, 1024)
    assert rows.max() + 1 <= num_rows_of_first_fit(lengths.tolist(), 1024)
    assert lengths.sum() / ((rows.max() + 1) * 1024) > 0.99


def test_the_same_lengths_give_the_same_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    assert np.array_equal(best_fit(lengths, 128), best_fit(lengths.astype(np.int32), 128))
    assert best_fit(np.array([], np.int64), 8).tolist() == []
    assert best_fit(np.array([3, 8, 5, 2, 3]), 8).tolist() == [1, 0, 1, 2, 2]
