"""From the data order to micro-batches: each rank reads its share of the global batch."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.order import Order, ShuffledOrder
from llmtrain.data.packing import IGNORE_INDEX, PADDING, Row, Rows

EVALUATION_SEED = 0  # not the recipe's: the same rows are evaluated whatever the run


class Loader:
    """The training batches of one rank.

    The global batch of step s is positions [s * sequences, (s + 1) * sequences) of the order; the
    ranks take consecutive equal shares of it, each cut into micro-batches.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        order: Order,
        sequences: int,
        micro_sequences: int,
        rank: int,
        world_size: int,
    ):
        """`sequences`: rows in the global batch, a multiple of `micro_sequences` * `world_size`."""
        if sequences % (micro_sequences * world_size):
            raise ValueError(f"{sequences} rows do not divide into {world_size} ranks of {micro_sequences}")
        self._rows, self._order = rows, order
        self._sequences, self._micro = sequences, micro_sequences
        self._rank, self._share = rank, sequences // world_size

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0."""
        first = step * self._sequences + self._rank * self._share
        sources, indices = self._order.rows_at(np.arange(first, first + self._share))
        return _cut(self._rows, sources, indices, self._micro)


def evaluation_batches(
    rows: Sequence[Rows], max_sequences: int, micro_sequences: int, rank: int, world_size: int
) -> list[MicroBatch]:
    """This rank's share of at most `max_sequences` held-out rows, evenly spread and always the same.

    No row counts twice, and all ranks have equally many micro-batches, since sharding engines meet in
    each forward: a rank with fewer rows fills up with some of no weight. The last may be smaller.
    """
    order = ShuffledOrder([len(source) for source in rows], EVALUATION_SEED)
    num = min(max_sequences, sum(len(source) for source in rows))
    if num == 0:
        return []
    sources, indices = order.rows_at(np.arange(num)[rank::world_size])
    batches = _cut(rows, sources, indices, micro_sequences)
    most = math.ceil(math.ceil(num / world_size) / micro_sequences)  # rank 0 has the most rows
    return batches + [_without_weight(rows, *order.rows_at(np.arange(1)))] * (most - len(batches))


def _without_weight(rows: Sequence[Rows], sources: np.ndarray, indices: np.ndarray) -> MicroBatch:
    """A micro-batch of a row of which nothing counts."""
    (batch,) = _cut(rows, sources, indices, 1)
    nothing = torch.full_like(batch.tensors["targets"], IGNORE_INDEX)
    return MicroBatch({**batch.tensors, "targets": nothing}, {POLICY: 0.0}, 0)


def _cut(rows: Sequence[Rows], sources: np.ndarray, indices: np.ndarray, micro_sequences: int) -> list[MicroBatch]:
    chosen = [rows[source][index] for source, index in zip(sources.tolist(), indices.tolist(), strict=True)]
    return [_collate(chosen[i : i + micro_sequences]) for i in range(0, len(chosen), micro_sequences)]


def _collate(rows: Sequence[Row]) -> MicroBatch:
    """Tensors int64 [len(rows), T] named as the fields of Row; the weight is the number of targets."""
    columns = zip(*rows, strict=True)
    tensors = {name: torch.from_numpy(np.stack(column)) for name, column in zip(Row._fields, columns, strict=True)}
    num_targets = int((tensors["targets"] != IGNORE_INDEX).sum())
    num_tokens = int((tensors["document_ids"] != PADDING).sum())
    return MicroBatch(tensors, {POLICY: float(num_targets)}, num_tokens)
