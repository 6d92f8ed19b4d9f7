"""Rows of about the same length in each global batch, so that padding to the longest costs little."""

from collections.abc import Sequence

import numpy as np

from llmtrain.data.counted_random import Int64Array
from llmtrain.data.hashing import derive_seed
from llmtrain.data.order import MixtureOrder, ShuffledOrder, permutation_index
from llmtrain.data.packing import Rows

GLOBAL_BATCHES_IN_A_BLOCK = 64
BLOCKS_REMEMBERED = 2  # a global batch may lie across two


class LengthGroupedOrder:
    """Another order, in which each block of 64 global batches is sorted by length.

    The block is cut into its global batches, which are then shuffled: a batch's rows are alike, and
    batches of all lengths come in random order. Blocks do not cross an epoch's end, so each epoch has
    each row once; the global batch across the end has rows of two lengths. Like any order it is a pure
    function of (seed, position).
    """

    def __init__(self, order: ShuffledOrder | MixtureOrder, rows: Sequence[Rows], sequences: int, seed: int):
        """`sequences`: rows in the global batch."""
        self._order, self._rows, self._sequences = order, rows, sequences
        self._size = GLOBAL_BATCHES_IN_A_BLOCK * sequences
        self._seed = derive_seed(seed, "grouping")
        self._blocks: dict[int, tuple[Int64Array, Int64Array]] = {}

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        epoch = self._order.epoch
        epoch_first = np.zeros_like(positions) if epoch is None else positions // epoch * epoch
        firsts = epoch_first + (positions - epoch_first) // self._size * self._size
        source, row = np.empty_like(positions), np.empty_like(positions)
        for first in np.unique(firsts).tolist():
            here = firsts == first
            sources, indices = self._block(first)
            source[here], row[here] = sources[positions[here] - first], indices[positions[here] - first]
        return source, row

    def _block(self, first: int) -> tuple[Int64Array, Int64Array]:
        """The rows of the block that begins at position `first`, in their new order."""
        if first not in self._blocks:
            while len(self._blocks) >= BLOCKS_REMEMBERED:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[first] = self._grouped(first)
        return self._blocks[first]

    def _grouped(self, first: int) -> tuple[Int64Array, Int64Array]:
        last, epoch = first + self._size, self._order.epoch
        if epoch is not None:
            last = min(last, first // epoch * epoch + epoch)
        sources, indices = self._order.rows_at(np.arange(first, last))
        by_length = np.argsort(lengths_of(self._rows, sources, indices), kind="stable")
        # The block's first and last batch may be shared with its neighbours, and then are parts here.
        inner = np.arange(first // self._sequences + 1, -(-last // self._sequences)) * self._sequences
        edges = np.concatenate([[first], inner, [last]]) - first
        num = len(edges) - 1
        batches = permutation_index(np.arange(num), num, self._seed, first).tolist()
        places = np.concatenate([np.arange(edges[batch], edges[batch + 1]) for batch in batches])
        chosen = np.empty_like(by_length)
        chosen[places] = by_length
        return sources[chosen], indices[chosen]


def lengths_of(rows: Sequence[Rows], sources: Int64Array, indices: Int64Array) -> Int64Array:
    """Tokens in each row, like `indices`."""
    lengths = np.empty_like(indices)
    for number, source in enumerate(rows):
        here = sources == number
        lengths[here] = source.lengths(indices[here])
    return lengths
