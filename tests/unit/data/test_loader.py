"""The loader cuts one global batch for every world size and micro-batch."""

from collections import Counter

import numpy as np
import pytest
import torch

from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.data.order import MixtureOrder, Order, ShuffledOrder
from llmtrain.data.packing import IGNORE_INDEX, PADDING, PackedRows
from tests.unit.data.corpora import corpus_of

T = 8
ROWS = [PackedRows(corpus_of([5, 9, 2, 30, 3], 100), T, 0), PackedRows(corpus_of([11, 50, 6], 1000), T, 0)]
LENGTHS = [len(rows) for rows in ROWS]
SEQUENCES = 8


def inputs(batch: list[MicroBatch]) -> list[list[int]]:
    return [row for micro in batch for row in micro.tensors["input_ids"].tolist()]


@pytest.mark.parametrize("order", [ShuffledOrder(LENGTHS, 3), MixtureOrder(LENGTHS, [1.0, 2.0], 3)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_sequences", [1, 2])
def test_the_global_batch_is_the_same_however_it_is_cut(order: Order, world_size: int, micro_sequences: int) -> None:
    for step in (0, 1, 7, 1000):
        sources, indices = order.rows_at(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES))
        expected = [ROWS[source][index].input_ids.tolist() for source, index in zip(sources, indices, strict=True)]
        found = []
        for rank in range(world_size):
            batch = Loader(ROWS, order, SEQUENCES, micro_sequences, rank, world_size).micro_batches(step)
            assert len(batch) == SEQUENCES // world_size // micro_sequences
            found += inputs(batch)
        assert found == expected


def test_micro_batches_have_what_the_contract_says() -> None:
    (micro,) = Loader(ROWS, ShuffledOrder(LENGTHS, 0), 6, 6, 0, 1).micro_batches(2)
    assert list(micro.tensors) == ["input_ids", "targets", "position_ids", "document_ids"]
    assert all(tensor.shape == (6, T) and tensor.dtype == torch.int64 for tensor in micro.tensors.values())
    assert micro.weights == {POLICY: (micro.tensors["targets"] != IGNORE_INDEX).sum().item()}
    assert micro.num_tokens == (micro.tensors["document_ids"] != PADDING).sum().item()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows do not divide into 2 ranks of 3"):
        Loader(ROWS, ShuffledOrder(LENGTHS, 0), 8, 3, 0, 2)


@pytest.mark.parametrize("max_sequences", [1, 5, 1000])
def test_the_same_rows_are_evaluated_whatever_the_world(max_sequences: int) -> None:
    def evaluated(world_size: int, micro_sequences: int) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        numbers = set()
        for rank in range(world_size):
            batch = evaluation_batches(ROWS, max_sequences, micro_sequences, rank, world_size)
            numbers.add(len(batch))
            assert all(0 < len(micro.tensors["targets"]) <= micro_sequences for micro in batch)
            for micro in batch:
                assert micro.weights[POLICY] == (micro.tensors["targets"] != IGNORE_INDEX).sum()
            found.update(tuple(row) for row in inputs([micro for micro in batch if micro.weights[POLICY]]))
        assert len(numbers) == 1, "sharding engines would wait for the ranks that have less to do"
        return found

    expected = evaluated(1, 1)
    assert sum(expected.values()) == min(max_sequences, sum(LENGTHS))
    assert set(expected.values()) == {1}
    for world_size in (1, 2, 4):
        for micro_sequences in (1, 2, 4):
            assert evaluated(world_size, micro_sequences) == expected


def test_evaluated_rows_are_spread() -> None:
    rows = [PackedRows(corpus_of([8] * 1000), T, 0)]
    first = np.array(inputs(evaluation_batches(rows, 100, 10, 0, 1)))[:, 0]
    counts = np.histogram(first, bins=5, range=(10, 8010))[0]
    assert counts.min() >= 8  # 20 expected, standard deviation 4


def test_nothing_held_out_is_nothing_to_evaluate() -> None:
    assert evaluation_batches([], 10, 2, 0, 1) == []
