"""Rows against twins that are written with lists, document by document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data import packing
from llmtrain.data.cache import TokenCorpus
from llmtrain.data.packing import IGNORE_INDEX, PADDING, PackedRows, Row, Rows, SeparateRows
from tests.unit.data.corpora import corpus_of

PAD = 7
lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=20)
Position = tuple[int, int, int, int]  # input, target, position id, document id
PADDED: Position = (PAD, IGNORE_INDEX, 0, PADDING)


def positions(row: Row) -> list[Position]:
    assert all(field.dtype == np.int64 for field in row)
    return list(zip(*(field.tolist() for field in row), strict=True))


def pieces_of_stream(corpus: TokenCorpus) -> list[tuple[int, int, int]]:
    """(token, next token of its document or IGNORE_INDEX, document) of the whole stream."""
    found = []
    start = 0
    for document, end in enumerate(corpus.document_ends.tolist()):
        tokens = corpus.tokens[start:end].tolist()
        found += [(*pair, document) for pair in zip(tokens, [*tokens[1:], IGNORE_INDEX], strict=True)]
        start = end
    return found


def twin_row(part: list[tuple[int, int, int]], sequence_length: int) -> list[Position]:
    row: list[Position] = []
    documents = [document for _, _, document in part]
    for i, (token, target, document) in enumerate(part):
        row.append((token, target, i - documents.index(document), document - documents[0]))
    return row + [PADDED] * (sequence_length - len(part))


def packed_twin(corpus: TokenCorpus, sequence_length: int) -> list[list[Position]]:
    stream = pieces_of_stream(corpus)
    parts = [stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length)]
    return [twin_row(part, sequence_length) for part in parts if any(target >= 0 for _, target, _ in part)]


def separate_twin(corpus: TokenCorpus, sequence_length: int) -> list[list[Position]]:
    stream = pieces_of_stream(corpus)
    rows = []
    for document in range(corpus.num_documents):
        own = [entry for entry in stream if entry[2] == document]
        parts = [own[i : i + sequence_length] for i in range(0, len(own), sequence_length)]
        rows += [twin_row(part, sequence_length) for part in parts if any(target >= 0 for _, target, _ in part)]
    return rows


def all_rows(rows: Rows) -> list[list[Position]]:
    return [positions(rows[i]) for i in range(len(rows))]


@given(lengths_of_documents, st.integers(2, 40))
def test_packed_rows_are_their_twin(lengths: list[int], sequence_length: int) -> None:
    corpus = corpus_of(lengths)
    assert all_rows(PackedRows(corpus, sequence_length, PAD)) == packed_twin(corpus, sequence_length)


@given(lengths_of_documents, st.integers(2, 40))
def test_separate_rows_are_their_twin(lengths: list[int], sequence_length: int) -> None:
    corpus = corpus_of(lengths)
    assert all_rows(SeparateRows(corpus, sequence_length, PAD)) == separate_twin(corpus, sequence_length)


@pytest.mark.parametrize("kind", [PackedRows, SeparateRows])
@given(lengths=lengths_of_documents, sequence_length=st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once(
    kind: type[PackedRows] | type[SeparateRows], lengths: list[int], sequence_length: int
) -> None:
    corpus = corpus_of(lengths)
    rows = kind(corpus, sequence_length, PAD)
    found = [rows[i] for i in range(len(rows))]
    targets = np.concatenate([row.targets for row in found])
    firsts = corpus.tokens[[0, *corpus.document_ends[:-1].tolist()]]
    assert sorted(targets[targets != IGNORE_INDEX]) == sorted(set(corpus.tokens.tolist()) - set(firsts.tolist()))
    for row in found:  # no row without a target: a step of it would have no loss
        counted = row.targets != IGNORE_INDEX
        assert counted.any()
        assert (row.targets[counted] == row.input_ids[counted] + 1).all()


def test_separate_rows_across_blocks_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(np.random.default_rng(0).integers(2, 30, size=50).tolist())
    expected = separate_twin(corpus, 8)
    for size in (1, 3, 50, 64):
        monkeypatch.setattr(packing, "DOCUMENTS_IN_A_BLOCK", size)
        assert all_rows(SeparateRows(corpus, 8, PAD)) == expected


@pytest.mark.parametrize("kind", [PackedRows, SeparateRows])
def test_rows_out_of_range(kind: type[PackedRows] | type[SeparateRows]) -> None:
    rows = kind(corpus_of([5, 5]), 4, PAD)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {index} of {len(rows)}"):
            rows[index]
    assert len(kind(corpus_of([]), 4, PAD)) == 0


def test_a_row_reads_only_its_own_tokens() -> None:
    """10^11 tokens, as memory that is never touched but for one row."""
    num = 10**11
    tokens = np.broadcast_to(np.uint16(3), num)
    ends = np.arange(1, 1001, dtype=np.int64) * (num // 1000)
    rows = PackedRows(TokenCorpus(tokens, ends, 0), 1024, PAD)
    row = rows[len(rows) - 1]
    assert row.targets[row.document_ids != PADDING].tolist()[-2:] == [3, IGNORE_INDEX]
    middle = rows[int(ends[0]) // 1024]
    boundary = int(ends[0]) % 1024
    assert middle.position_ids[boundary] == 0 and middle.targets[boundary - 1] == IGNORE_INDEX
