"""Planned rows hold every document once, whole or cut as asked, with the targets that separate rows have."""

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data import row_plan as module
from llmtrain.data.cache import TokenCorpus
from llmtrain.data.packing import IGNORE_INDEX, PADDING, PackedRows, PlannedRows
from llmtrain.data.row_plan import PlanSettings, RowCounts, empty_documents, plan_rows, plan_stream
from tests.unit.data.corpora import corpus_of
from tests.unit.data.test_packing import (
    PAD,
    Position,
    all_rows,
    masked_corpora,
    pieces_of_stream,
    trained_twin,
    twin_row,
)

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=20)
sequence_lengths = st.integers(2, 40)
overflows = st.sampled_from(["truncate", "split"])
Piece = list[tuple[int, int, int]]


def planned(corpus: TokenCorpus, sequence_length: int, **how: Any) -> tuple[PlannedRows, RowCounts]:
    settings = PlanSettings(**{"packing": "best_fit", "overflow": "split", "sequence_length": sequence_length, **how})
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as cache:  # hundreds of plans would wait for the disk
        plan, counts = plan_rows(corpus, "key", settings, Path(cache))
        rows = PlannedRows(corpus, plan, sequence_length, PAD, ragged=settings.packing == "none")
    return rows, counts  # the maps outlive their files' names


def pieces_twin(corpus: TokenCorpus, sequence_length: int, overflow: str) -> list[Piece]:
    """The pieces that have a target, in the order of the documents."""
    stream = pieces_of_stream(corpus)
    pieces = []
    for document in range(corpus.num_documents):
        own = [entry for entry in stream if entry[2] == document]
        parts = [own[i : i + sequence_length] for i in range(0, len(own), sequence_length)]
        pieces += parts[:1] if overflow == "truncate" else parts
    return [piece for piece in pieces if any(target >= 0 for _, target, _ in piece)]


def pieces_in(rows: PlannedRows) -> list[list[Position]]:
    """The documents in the rows, each as a row without padding; they are told apart by their position ids."""
    found = []
    for row in all_rows(rows):
        for number in sorted({document for *_, document in row} - {PADDING}):
            found.append([(*entry[:3], 0) for entry in row if entry[3] == number])
    return found


@given(masked_corpora(), sequence_lengths, overflows)
def test_separate_rows_are_their_twin(corpus: TokenCorpus, sequence_length: int, overflow: str) -> None:
    rows, _ = planned(corpus, sequence_length, packing="none", overflow=overflow)
    pieces = pieces_twin(corpus, sequence_length, overflow)
    assert all_rows(rows) == [twin_row(piece, sequence_length) for piece in pieces]
    assert rows.lengths(np.arange(len(rows))).tolist() == [len(piece) for piece in pieces]


@given(masked_corpora(), sequence_lengths, overflows)
def test_packed_rows_hold_what_separate_rows_hold(corpus: TokenCorpus, sequence_length: int, overflow: str) -> None:
    rows, counts = planned(corpus, sequence_length, overflow=overflow)
    pieces = pieces_twin(corpus, sequence_length, overflow)
    # Tokens, targets and positions of each piece are those of a row of its own; the order is another.
    assert sorted(pieces_in(rows)) == sorted(twin_row(piece, len(piece)) for piece in pieces)
    lengths = [sum(entry[3] != PADDING for entry in row) for row in all_rows(rows)]
    assert all(0 < length <= sequence_length for length in lengths)
    assert rows.lengths(np.arange(len(rows))).tolist() == lengths and counts.num_tokens == sum(lengths)
    for row in all_rows(rows):
        num = sum(entry[3] != PADDING for entry in row)
        padding = [(PAD, IGNORE_INDEX, i, PADDING) for i in range(sequence_length - num)]
        assert row[num:] == padding and all(document != PADDING for *_, document in row[:num])


@given(masked_corpora(), sequence_lengths, overflows, st.sampled_from(["best_fit", "none"]))
def test_the_tokens_to_predict_are_the_targets(
    corpus: TokenCorpus, sequence_length: int, overflow: str, packing: str
) -> None:
    rows, _ = planned(corpus, sequence_length, packing=packing, overflow=overflow)
    for index in range(len(rows)):
        row = rows[index]
        assert row.trained.tolist() == trained_twin(corpus, row)
        # All targets are, but for one after the row's last place.
        targets = set(row.targets.tolist()) - {IGNORE_INDEX}
        assert len(targets - set(row.input_ids[row.trained].tolist())) <= 1


@given(masked_corpora(), sequence_lengths)
def test_split_documents_lose_no_trained_token(corpus: TokenCorpus, sequence_length: int) -> None:
    rows, counts = planned(corpus, sequence_length, overflow="split")
    found = sorted(target for row in all_rows(rows) for _, target, _, _ in row if target != IGNORE_INDEX)
    assert found == sorted(target for _, target, _ in pieces_of_stream(corpus) if target != IGNORE_INDEX)
    assert counts.num_trained == len(found)
    assert counts.num_truncated == counts.num_dropped == counts.num_cut_off == 0


@given(masked_corpora(), sequence_lengths, overflows, st.sampled_from(["best_fit", "none"]))
def test_tokens_that_are_predicted_at_their_own_places(
    corpus: TokenCorpus, sequence_length: int, overflow: str, packing: str
) -> None:
    """Without a look ahead no row is asked for a token that it does not hold, and none is lost at an end."""
    rows, counts = planned(corpus, sequence_length, packing=packing, overflow=overflow, lookahead=0)
    found = sorted(token for index in range(len(rows)) for token in rows[index].input_ids[rows[index].trained].tolist())
    ends = corpus.document_ends.tolist()
    lasts = [
        min(end, begin + sequence_length) if overflow == "truncate" else end for begin, end in pairwise([0, *ends])
    ]
    assert corpus.trained is not None
    held = [place for begin, last in zip([0, *ends], lasts, strict=False) for place in range(begin + 1, last)]
    assert found == sorted(int(corpus.tokens[place]) for place in held if corpus.trained[place])
    assert counts.num_trained == len(found)
    assert rows.lengths(np.arange(len(rows))).sum() == counts.num_tokens
    assert all((rows[index].targets >= 0).sum() <= rows[index].trained.sum() for index in range(len(rows)))


@given(lengths_of_documents, sequence_lengths)
def test_texts_lose_no_token(lengths: list[int], sequence_length: int) -> None:
    corpus = corpus_of(lengths)
    rows, counts = planned(corpus, sequence_length)
    seen = {token for row in all_rows(rows) for entry in row if entry[3] != PADDING for token in entry[:2]}
    assert seen - {IGNORE_INDEX} == set(corpus.tokens.tolist())
    assert counts.num_split == sum(length > sequence_length + 1 for length in lengths)
    assert counts.num_empty == 0 and counts.longest == max(lengths)


@given(masked_corpora(), sequence_lengths)
def test_what_is_lost_is_counted(corpus: TokenCorpus, sequence_length: int) -> None:
    _, counts = planned(corpus, sequence_length, overflow="truncate")
    stream = pieces_of_stream(corpus)
    kept = pieces_twin(corpus, sequence_length, "truncate")
    lengths = corpus.lengths().tolist()
    assert counts.num_documents == len(lengths)
    assert counts.num_truncated == sum(length > sequence_length + 1 for length in lengths)
    assert counts.num_dropped == sum(max(0, length - sequence_length - 1) for length in lengths)
    assert counts.num_trained == sum(target >= 0 for piece in kept for _, target, _ in piece)
    trained = {document for _, target, document in stream if target >= 0}
    assert counts.num_untrained == len(lengths) - len(trained)
    in_rows = {piece[0][2] for piece in kept}
    empty = [document for document in range(len(lengths)) if document not in in_rows]
    assert counts.num_cut_off == len(trained - in_rows) and counts.num_empty == len(empty)
    assert counts.first_empty == (empty[0] if empty else None)
    assert list(empty_documents(corpus, PlanSettings("best_fit", "truncate", sequence_length))) == empty


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_blocks_change_nothing_but_what_shares_a_row(
    monkeypatch: pytest.MonkeyPatch, packing: str, overflow: str
) -> None:
    chooser = np.random.default_rng(0)
    lengths = chooser.integers(2, 30, size=50).tolist()
    corpus = corpus_of(lengths, trained=(chooser.random(sum(lengths)) < 0.1).tolist())
    rows, counts = planned(corpus, 8, packing=packing, overflow=overflow)
    for documents, tokens, at_a_time in ((1, 1 << 30, 1), (3, 1 << 30, 40), (50, 17, 1 << 22)):
        monkeypatch.setattr(module, "DOCUMENTS_IN_A_BLOCK", documents)
        monkeypatch.setattr(module, "TOKENS_IN_A_BLOCK", tokens)
        monkeypatch.setattr(module, "TOKENS_AT_A_TIME", at_a_time)
        others, other_counts = planned(corpus, 8, packing=packing, overflow=overflow)
        assert sorted(pieces_in(others)) == sorted(pieces_in(rows)) and other_counts == counts


def stream(corpus: TokenCorpus, sequence_length: int) -> tuple[PackedRows, RowCounts]:
    settings = PlanSettings("documents", "truncate", sequence_length)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as cache:
        starts, counts = plan_stream(corpus, "key", settings, Path(cache))
    return PackedRows(corpus, sequence_length, PAD, starts), counts


@given(masked_corpora(), sequence_lengths, st.sampled_from([1, 3, 1 << 20]))
def test_rows_of_the_stream_without_a_target_are_left_out(
    corpus: TokenCorpus, sequence_length: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_IN_A_BLOCK", block)
        rows, counts = stream(corpus, sequence_length)
    whole = all_rows(PackedRows(corpus, sequence_length, PAD))
    expected = [row for row in whole if any(target != IGNORE_INDEX for _, target, _, _ in row)]
    assert all_rows(rows) == expected
    assert counts.num_trained == sum(target != IGNORE_INDEX for row in expected for _, target, _, _ in row)
    lengths = [sum(entry[3] != PADDING for entry in row) for row in expected]
    assert rows.lengths(np.arange(len(rows))).tolist() == lengths and counts.num_tokens == sum(lengths)


def test_documents_of_the_stream_are_counted() -> None:
    corpus = corpus_of([4, 3, 50], trained=[False] * 4 + [False, False, True] + [True] * 50)
    _, counts = stream(corpus, 8)
    assert counts == RowCounts(
        num_documents=3, num_tokens=56, num_trained=1 + 49, longest=50, num_untrained=1, first_empty=0
    )


def test_a_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of([5, 9, 30])
    settings = PlanSettings("best_fit", "split", 8)
    first = plan_rows(corpus, "a", settings, tmp_path)
    monkeypatch.setattr(module, "_write", None)
    again = plan_rows(corpus, "a", settings, tmp_path)
    assert again[1] == first[1] and np.array_equal(again[0].starts, first[0].starts)
    for key, other in (
        ("b", settings),
        ("a", PlanSettings("none", "split", 8)),
        ("a", PlanSettings("best_fit", "split", 9)),
    ):
        with pytest.raises(TypeError):
            plan_rows(corpus, key, other, tmp_path)


def test_an_empty_half_has_no_rows() -> None:
    rows, counts = planned(corpus_of([]), 8)
    assert len(rows) == 0 and counts == RowCounts()
    with pytest.raises(IndexError, match="row 0 of 0"):
        rows[0]
