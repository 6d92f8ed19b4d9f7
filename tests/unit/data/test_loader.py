"""The loader cuts one global batch for every world size and micro-batch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.grouping import LengthGroupedOrder
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.data.order import MixtureOrder, Order, ShuffledOrder
from llmtrain.data.packing import IGNORE_INDEX, PADDING, PackedRows, PlannedRows, RowPlan, Rows
from tests.unit.data.corpora import corpus_of

T = 8
ROWS: list[Rows] = [
    PackedRows(corpus_of([5, 9, 2, 30, 3], 100), T, 0),
    PackedRows(corpus_of([11, 50, 6], 1000), T, 0),
]
LENGTHS = [len(rows) for rows in ROWS]
SEQUENCES = 8


def ragged_rows(lengths: list[int], first_token: int) -> PlannedRows:
    """Rows of one document each."""
    corpus = corpus_of(lengths, first_token)
    starts = corpus.document_ends - corpus.lengths()
    plan = RowPlan(starts, corpus.lengths().astype(np.int32), np.arange(1, len(lengths) + 1, dtype=np.int64))
    return PlannedRows(corpus, plan, T, 0, ragged=True)


RAGGED: list[Rows] = [ragged_rows([5, 9, 2, 7, 3, 3, 8, 2, 6, 4], 100), ragged_rows([2, 2, 8, 3, 9, 4, 6], 1000)]
RAGGED_LENGTHS = [len(rows) for rows in RAGGED]
RAGGED_ORDERS: list[Order] = [
    ShuffledOrder(RAGGED_LENGTHS, 3),
    LengthGroupedOrder(ShuffledOrder(RAGGED_LENGTHS, 3), RAGGED, SEQUENCES, 3),
    LengthGroupedOrder(MixtureOrder(RAGGED_LENGTHS, [1.0, 2.0], 3), RAGGED, SEQUENCES, 3),
]


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


def content(rows: list[list[int]]) -> Counter[tuple[int, ...]]:
    """Rows without their padding, of which another micro-batch may have more."""
    return Counter(tuple(token for token in row if token) for row in rows)


@pytest.mark.parametrize("order", RAGGED_ORDERS)
@pytest.mark.parametrize("micro_sequences", [1, 2])
def test_ragged_rows_of_a_global_batch_do_not_depend_on_the_world(order: Order, micro_sequences: int) -> None:
    for step in (0, 1, 2, 7, 1000):
        sources, indices = order.rows_at(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES))
        expected = content(
            [RAGGED[source][index].input_ids.tolist() for source, index in zip(sources, indices, strict=True)]
        )
        for world_size in (1, 2, 4):
            batches = [
                Loader(RAGGED, order, SEQUENCES, micro_sequences, rank, world_size).micro_batches(step)
                for rank in range(world_size)
            ]
            assert content([row for batch in batches for row in inputs(batch)]) == expected
            lengths = [
                [micro.tensors["input_ids"].shape[1] for micro in together]
                for together in zip(*batches, strict=True)  # what the ranks do at the same time
            ]
            for earlier, later in pairwise(lengths):
                assert min(earlier) >= max(later)


def test_ragged_micro_batches_are_as_long_as_their_longest_row() -> None:
    loader = Loader(RAGGED, RAGGED_ORDERS[0], SEQUENCES, 2, 0, 1)
    for step in range(20):
        for micro in loader.micro_batches(step):
            shape = micro.tensors["input_ids"].shape
            tokens = (micro.tensors["document_ids"] != PADDING).sum(dim=1)
            assert shape == (2, tokens.max()) and micro.num_tokens == tokens.sum()
            of_rows = [tensor for name, tensor in micro.tensors.items() if name not in ("counted", "positions")]
            assert all(tensor.shape == shape and tensor.is_contiguous() for tensor in of_rows)
            assert micro.weights == {POLICY: (micro.tensors["targets"] != IGNORE_INDEX).sum().item()}
            for row, num in zip(micro.tensors["position_ids"].tolist(), tokens.tolist(), strict=True):
                assert row == [*range(num), *range(shape[1] - num)]  # padding is one more document


def test_micro_batches_have_what_the_contract_says() -> None:
    (micro,) = Loader(ROWS, ShuffledOrder(LENGTHS, 0), 6, 6, 0, 1).micro_batches(2)
    of_rows = ["input_ids", "targets", "position_ids", "document_ids", "trained"]
    assert list(micro.tensors) == [*of_rows, "counted", "positions"]
    kinds = {name: tensor.dtype for name, tensor in micro.tensors.items()}
    assert kinds.pop("trained") == torch.bool and set(kinds.values()) == {torch.int64}
    assert all(micro.tensors[name].shape == (6, T) for name in of_rows)
    assert micro.tensors["positions"].tolist() == list(range(12, 18))
    assert torch.equal(micro.tensors["counted"], (micro.tensors["targets"].flatten() != IGNORE_INDEX).nonzero()[:, 0])
    assert micro.weights == {POLICY: (micro.tensors["targets"] != IGNORE_INDEX).sum().item()}
    assert micro.num_tokens == (micro.tensors["document_ids"] != PADDING).sum().item()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows do not divide into 2 ranks of 3"):
        Loader(ROWS, ShuffledOrder(LENGTHS, 0), 8, 3, 0, 2)


@pytest.mark.parametrize("max_sequences", [1, 5, 1000])
@pytest.mark.parametrize("rows", [ROWS, RAGGED], ids=["packed", "ragged"])
def test_the_same_rows_are_evaluated_whatever_the_world(rows: list[Rows], max_sequences: int) -> None:
    def evaluated(world_size: int, micro_sequences: int) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        numbers = set()
        for rank in range(world_size):
            batch = evaluation_batches(rows, max_sequences, micro_sequences, rank, world_size)
            numbers.add(len(batch))
            assert all(0 < len(micro.tensors["targets"]) <= micro_sequences for micro in batch)
            for micro in batch:
                assert micro.weights[POLICY] == (micro.tensors["targets"] != IGNORE_INDEX).sum()
            found.update(content(inputs([micro for micro in batch if micro.weights[POLICY]])))
        assert len(numbers) == 1, "sharding engines would wait for the ranks that have less to do"
        return found

    expected = evaluated(1, 1)
    assert sum(expected.values()) == min(max_sequences, sum(len(source) for source in rows))
    assert set(expected.values()) == {1}
    for world_size in (1, 2, 4):
        for micro_sequences in (1, 2, 4):
            assert evaluated(world_size, micro_sequences) == expected


def test_evaluated_rows_are_spread() -> None:
    rows: list[Rows] = [PackedRows(corpus_of([8] * 1000), T, 0)]
    first = np.array(inputs(evaluation_batches(rows, 100, 10, 0, 1)))[:, 0]
    counts = np.histogram(first, bins=5, range=(10, 8010))[0]
    assert counts.min() >= 8  # 20 expected, standard deviation 4


def test_nothing_held_out_is_nothing_to_evaluate() -> None:
    assert evaluation_batches([], 10, 2, 0, 1) == []


@pytest.mark.parametrize("order", RAGGED_ORDERS)
def test_a_loader_that_begins_anywhere_gives_what_one_from_the_start_gives(order: Order) -> None:
    loader = Loader(RAGGED, order, SEQUENCES, 2, 0, 2)
    from_the_start = [inputs(loader.micro_batches(step)) for step in range(30)]
    for step in (29, 2, 3, 17):
        rows = list(RAGGED)
        fresh = LengthGroupedOrder(ShuffledOrder(RAGGED_LENGTHS, 3), rows, SEQUENCES, 3)
        resumed = fresh if order is RAGGED_ORDERS[1] else order
        assert inputs(Loader(rows, resumed, SEQUENCES, 2, 0, 2).micro_batches(step)) == from_the_start[step]


def test_each_row_says_where_it_stands_in_the_order() -> None:
    """Noise is drawn from it; so it is the same however the rows are dealt, in training and of held-out rows."""
    for rows, order in ((ROWS, ShuffledOrder(LENGTHS, 0)), (RAGGED, RAGGED_ORDERS[0])):
        for ranks, micro_sequences in ((1, 2), (1, SEQUENCES), (2, 1), (SEQUENCES, 1)):
            found: dict[int, torch.Tensor] = {}
            for rank in range(ranks):
                for micro in Loader(rows, order, SEQUENCES, micro_sequences, rank, ranks).micro_batches(3):
                    found |= dict(zip(micro.tensors["positions"].tolist(), micro.tensors["input_ids"], strict=True))
            assert sorted(found) == list(range(3 * SEQUENCES, 4 * SEQUENCES))
            sources, indices = order.rows_at(np.asarray(sorted(found)))
            for position, source, index in zip(sorted(found), sources.tolist(), indices.tolist(), strict=True):
                row = rows[source][index].input_ids
                width = len(found[position])
                assert found[position].tolist() == row[:width].tolist()
        for ranks in (1, 2):
            positions = [
                position
                for rank in range(ranks)
                for micro in evaluation_batches(rows, 10, 3, rank, ranks)
                for position in micro.tensors["positions"].tolist()
                if micro.weights[POLICY]
            ]
            assert sorted(positions) == list(range(len(positions)))
