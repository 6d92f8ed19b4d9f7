"""The data order: which row stands at which position, as a pure function of (seed, position).

There is no state, so training resumes anywhere, also in the middle of an epoch, and the order is
the same for every world size, micro-batch and engine.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llmtrain.data.counted_random import Int64Array, UInt64Array, splitmix64
from llmtrain.data.hashing import derive_seed

ROUNDS = 8  # of the Feistel network; four are the least that is indistinguishable from random in theory
ROWS_IN_A_CYCLE = 1000
LEAST_ROWS_OF_A_SOURCE = 10  # in a cycle, so that rounding moves no share by more than a twentieth


class Order(Protocol):
    """An endless sequence of rows."""

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source index, row index in that source) at each position, each int64 like `positions`."""
        ...


def permutation_index(index: Int64Array | int, n: int, seed: int, epoch: Int64Array | int) -> Int64Array:
    """Where `index` goes in a pseudo-random permutation of range(n), keyed by (seed, epoch).

    Random access with no memory: a Feistel network on pairs (left, right) of two ranges whose
    product just exceeds n, walked until it comes back into range(n) (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: int64 array of any shape, or a number, in range(n).
        epoch: the same shape, or a number.
    """
    width = math.isqrt(n - 1) + 1
    height = -(-n // width)
    value, epochs = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(epoch, np.int64))
    shape, value, epochs = value.shape, value.ravel(), epochs.ravel()
    keys = splitmix64(splitmix64(epochs.astype(np.uint64)) ^ np.uint64(derive_seed(seed, "permutation", n)))
    value = _network(value, width, height, keys)
    while (outside := value >= n).any():
        value[outside] = _network(value[outside], width, height, keys[outside])
    return value.reshape(shape)


def _network(value: Int64Array, width: int, height: int, keys: UInt64Array) -> Int64Array:
    """A bijection of range(width * height) for each key."""
    left, right = value.astype(np.uint64) // np.uint64(height), value.astype(np.uint64) % np.uint64(height)
    for number in range(ROUNDS):
        round_keys = splitmix64(keys + np.uint64(number))
        if number % 2:
            right = (right + splitmix64(left ^ round_keys) % np.uint64(height)) % np.uint64(height)
        else:
            left = (left + splitmix64(right ^ round_keys) % np.uint64(width)) % np.uint64(width)
    joined: Int64Array = (left * np.uint64(height) + right).astype(np.int64)
    return joined


class ShuffledOrder:
    """All rows of all sources once an epoch, shuffled anew each epoch.

    Attributes:
        epoch: rows in one.
    """

    def __init__(self, lengths: Sequence[int], seed: int):
        """`lengths`: rows of each source."""
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.epoch = int(self._starts[-1])
        self._seed = derive_seed(seed, "shuffle")

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        row = permutation_index(positions % self.epoch, self.epoch, self._seed, positions // self.epoch)
        source = np.searchsorted(self._starts, row, side="right") - 1
        return source, row - self._starts[source]


class MixtureOrder:
    """Sources in fixed shares: each cycle of rows has the same number from each, in shuffled order.

    Each source goes through its own rows in its own epochs, each row once an epoch; the whole has none.
    """

    epoch = None

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        """`lengths`: rows of each source; `weights`: their shares, relative to each other."""
        self._lengths = list(lengths)
        self.counts = cycle_counts(weights)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._cycle_seed = derive_seed(seed, "cycle")
        self._source_seeds = [derive_seed(seed, "source", source) for source in range(len(lengths))]

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        size = int(self._starts[-1])
        cycle = positions // size
        slot = permutation_index(positions % size, size, self._cycle_seed, cycle)
        source = np.searchsorted(self._starts, slot, side="right") - 1
        row = np.empty_like(slot)
        for number, (length, count) in enumerate(zip(self._lengths, self.counts, strict=True)):
            here = source == number
            nth = cycle[here] * count + slot[here] - self._starts[number]  # the nth row that this source gives
            row[here] = permutation_index(nth % length, length, self._source_seeds[number], nth // length)
        return source, row


def tempered(lengths: Sequence[int], temperature: float) -> list[float]:
    """Weights of sources in proportion to their rows ** (1 / temperature), the largest 1 (arXiv 1910.10683)."""
    most = max(lengths)
    return [(length / most) ** (1 / temperature) for length in lengths]


def cycle_counts(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a cycle, by largest remainder.

    A cycle has 1000 rows, or as many more as give the smallest source ten.
    """
    heaviest = max(weights)
    ratios = [weight / heaviest for weight in weights]  # the sum of the weights themselves may be infinite
    shares = np.asarray(ratios, np.float64) / math.fsum(ratios)
    size = max(ROWS_IN_A_CYCLE, math.ceil(LEAST_ROWS_OF_A_SOURCE / shares.min()))
    counts = np.floor(shares * size).astype(np.int64)
    by_remainder = np.argsort(counts - shares * size, kind="stable")
    counts[by_remainder[: size - int(counts.sum())]] += 1
    return [int(count) for count in counts]
