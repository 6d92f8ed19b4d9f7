"""From the data order to micro-batches: each rank reads its share of the global batch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.counted_random import Int64Array
from llmtrain.data.grouping import lengths_of
from llmtrain.data.order import Order, ShuffledOrder
from llmtrain.data.packing import IGNORE_INDEX, PADDING, Row, Rows

LEAST_LENGTH = 2  # of a row; one token predicts nothing
EVALUATION_SEED = 0  # not the recipe's: the same rows are evaluated whatever the run


class Collator(Protocol):
    """Makes micro-batches of rows."""

    def collate(self, rows: Sequence[Any], positions: Int64Array, ragged: bool) -> MicroBatch:
        """A micro-batch; `positions`, int64 [len(rows)], are those of the rows in the order."""
        ...

    def without_weight(self, micro: MicroBatch) -> MicroBatch:
        """A micro-batch of the same rows in which nothing counts."""
        ...


class Loader:
    """The training batches of one rank.

    The global batch of step s is positions [s * sequences, (s + 1) * sequences) of the order; the
    ranks take consecutive equal shares of it, each cut into micro-batches. Ragged rows are first sorted,
    the longest first, and dealt so that what the ranks do at the same time is of about the same length:
    they wait for each other, and a batch too large for the memory shows at once.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        order: Order,
        sequences: int,
        micro_sequences: int,
        rank: int,
        world_size: int,
        collator: "Collator | None" = None,
    ):
        """`sequences`: rows in the global batch, a multiple of `micro_sequences` * `world_size`.

        `collator`: of the rows; by default that of rows of tokens.
        """
        if sequences % (micro_sequences * world_size):
            raise ValueError(f"{sequences} rows do not divide into {world_size} ranks of {micro_sequences}")
        self._rows, self._order, self._collator = rows, order, collator or TokenCollator()
        self._sequences, self._micro = sequences, micro_sequences
        self._rank, self._world_size = rank, world_size
        self._ragged = any(source.ragged for source in rows)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0."""
        first = step * self._sequences
        if self._ragged:
            sources, indices = self._order.rows_at(np.arange(first, first + self._sequences))
            dealt = _longest_first(self._rows, sources, indices).reshape(-1, self._world_size, self._micro)
            mine = dealt[:, self._rank].ravel()
            return _cut(self._rows, sources[mine], indices[mine], first + mine, self._micro, self._collator)
        share = self._sequences // self._world_size
        first += self._rank * share
        positions = np.arange(first, first + share)
        return _cut(self._rows, *self._order.rows_at(positions), positions, self._micro, self._collator)


def evaluation_batches(
    rows: Sequence[Rows],
    max_sequences: int,
    micro_sequences: int,
    rank: int,
    world_size: int,
    collator: Collator | None = None,
) -> list[MicroBatch]:
    """This rank's share of at most `max_sequences` held-out rows, evenly spread and always the same.

    No row counts twice, and all ranks have equally many micro-batches, since sharding engines meet in
    each forward: a rank with fewer rows fills up with some of no weight. The last may be smaller.
    """
    collator = collator or TokenCollator()
    order = ShuffledOrder([len(source) for source in rows], EVALUATION_SEED)
    num = min(max_sequences, sum(len(source) for source in rows))
    if num == 0:
        return []
    positions = np.arange(num)
    sources, indices = order.rows_at(positions)
    if any(source.ragged for source in rows):
        positions = _longest_first(rows, sources, indices)
    mine = positions[rank::world_size]
    batches = _cut(rows, sources[mine], indices[mine], mine, micro_sequences, collator)
    most = math.ceil(math.ceil(num / world_size) / micro_sequences)  # rank 0 has the most rows
    if len(batches) == most:
        return batches
    (first,) = _cut(rows, *order.rows_at(np.arange(1)), np.zeros(1, np.int64), 1, collator)
    return batches + [collator.without_weight(first)] * (most - len(batches))


def all_batches(
    rows: Sequence[Rows], micro_sequences: int, rank: int, world_size: int, collator: Collator
) -> Iterator[MicroBatch]:
    """Every row once, over all ranks, the longest first where they are ragged; as many micro-batches on each rank."""
    lengths = [len(source) for source in rows]
    sources = np.repeat(np.arange(len(rows)), lengths)
    indices = np.concatenate([np.arange(length) for length in lengths])
    order = np.arange(len(indices))
    if any(source.ragged for source in rows):
        order = _longest_first(rows, sources, indices)
    a_round = micro_sequences * world_size
    for first in range(0, len(order), a_round):
        mine = order[first + rank : first + a_round : world_size]
        if len(mine):
            yield from _cut(rows, sources[mine], indices[mine], mine, micro_sequences, collator)
        else:  # the last round is not full
            (micro,) = _cut(rows, sources[order[:1]], indices[order[:1]], order[:1], 1, collator)
            yield collator.without_weight(micro)


def _longest_first(rows: Sequence[Rows], sources: Int64Array, indices: Int64Array) -> Int64Array:
    """Places in `indices`, those of the longest rows first; equally long ones stay as they are."""
    places: Int64Array = np.argsort(-lengths_of(rows, sources, indices), kind="stable")
    return places


def _cut(
    rows: Sequence[Rows],
    sources: Int64Array,
    indices: Int64Array,
    positions: Int64Array,
    micro_sequences: int,
    collator: Collator,
) -> list[MicroBatch]:
    chosen = [rows[source][index] for source, index in zip(sources.tolist(), indices.tolist(), strict=True)]
    ragged = any(source.ragged for source in rows)
    parts = [slice(i, i + micro_sequences) for i in range(0, len(chosen), micro_sequences)]
    return [collator.collate(chosen[part], positions[part], ragged) for part in parts]


class TokenCollator:
    """Of rows of tokens (`packing.Row`)."""

    def collate(self, rows: Sequence[Row], positions: Int64Array, ragged: bool) -> MicroBatch:
        """Tensors [len(rows), T] named as the fields of Row; the weight is the number of targets.

        `counted` [number of targets] says where they are in the flattened rows, so that a head need not compute
        what does not count; found here, because to find it on a GPU the host would have to wait. `positions`
        [len(rows)], of the rows in the order, is what noise is drawn from.
        Columns that are padding in all rows are cut off where they are ragged; packed rows keep one shape,
        which kernels and allocators are fastest with.
        """
        columns = zip(*rows, strict=True)
        stacked = {name: np.stack(column) for name, column in zip(Row._fields, columns, strict=True)}
        is_token = stacked["document_ids"] != PADDING
        if ragged:
            longest = max(LEAST_LENGTH, int(is_token.sum(axis=1).max()))
            stacked = {name: np.ascontiguousarray(array[:, :longest]) for name, array in stacked.items()}
        tensors = {name: torch.from_numpy(array) for name, array in stacked.items()}
        tensors["counted"] = torch.from_numpy(np.flatnonzero(stacked["targets"] != IGNORE_INDEX))
        tensors["positions"] = torch.from_numpy(positions)
        return MicroBatch(tensors, {POLICY: float(len(tensors["counted"]))}, int(is_token.sum()))

    def without_weight(self, micro: MicroBatch) -> MicroBatch:
        """A micro-batch of the same rows in which nothing counts."""
        tensors = dict(micro.tensors)
        tensors["targets"] = torch.full_like(tensors["targets"], IGNORE_INDEX)
        tensors["trained"] = torch.zeros_like(tensors["trained"])
        tensors["counted"] = torch.empty(0, dtype=torch.int64)
        return MicroBatch(tensors, {POLICY: 0.0}, 0)
