"""Rows cut from the stream against a twin that is written with lists, document by document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.cache import TokenCorpus
from llmtrain.data.packing import IGNORE_INDEX, PADDING, PackedRows, Row, Rows
from tests.unit.data.corpora import corpus_of

PAD = 7
lengths_of_documents = st.lists(st.integers(2, 30), min_size=1, max_size=20)
Position = tuple[int, int, int, int]  # input, target, position id, document id


@st.composite
def masked_corpora(draw: st.DrawFn) -> TokenCorpus:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    num = sum(lengths)
    return corpus_of(lengths, trained=draw(st.lists(st.booleans(), min_size=num, max_size=num)))


def positions(row: Row) -> list[Position]:
    *numbers, trained = row
    assert trained.dtype == np.bool_ and all(field.dtype == np.int64 for field in numbers)
    return list(zip(*(field.tolist() for field in numbers), strict=True))


def pieces_of_stream(corpus: TokenCorpus) -> list[tuple[int, int, int]]:
    """(token, next token of its document if it is trained or IGNORE_INDEX, document) of the whole stream."""
    found = []
    start = 0
    for document, end in enumerate(corpus.document_ends.tolist()):
        tokens = corpus.tokens[start:end].tolist()
        trained = [1] * len(tokens) if corpus.trained is None else corpus.trained[start:end].tolist()
        targets = [token if counts else IGNORE_INDEX for token, counts in zip(tokens, trained, strict=True)]
        found += [(*pair, document) for pair in zip(tokens, [*targets[1:], IGNORE_INDEX], strict=True)]
        start = end
    return found


def twin_row(part: list[tuple[int, int, int]], sequence_length: int) -> list[Position]:
    row: list[Position] = []
    documents = [document for _, _, document in part]
    order = list(dict.fromkeys(documents))
    for i, (token, target, document) in enumerate(part):
        row.append((token, target, i - documents.index(document), order.index(document)))
    return row + [(PAD, IGNORE_INDEX, i, PADDING) for i in range(sequence_length - len(part))]


def packed_twin(corpus: TokenCorpus, sequence_length: int) -> list[list[Position]]:
    stream = pieces_of_stream(corpus)[: max(1, corpus.num_tokens - 1)]
    parts = [stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length)]
    if len(parts[-1]) < sequence_length:  # the very last token is no row of its own, but stands in one
        parts[-1] = pieces_of_stream(corpus)[-len(parts[-1]) - 1 :]
    return [twin_row(part, sequence_length) for part in parts]


def all_rows(rows: Rows) -> list[list[Position]]:
    return [positions(rows[i]) for i in range(len(rows))]


@given(lengths_of_documents, st.integers(2, 40))
def test_packed_rows_are_their_twin(lengths: list[int], sequence_length: int) -> None:
    corpus = corpus_of(lengths)
    assert all_rows(PackedRows(corpus, sequence_length, PAD)) == packed_twin(corpus, sequence_length)


@given(lengths_of_documents, st.integers(2, 40), st.data())
def test_packed_rows_train_what_the_mask_says(lengths: list[int], sequence_length: int, data: st.DataObject) -> None:
    num = sum(lengths)
    corpus = corpus_of(lengths, trained=data.draw(st.lists(st.booleans(), min_size=num, max_size=num)))
    rows = PackedRows(corpus, sequence_length, PAD)
    assert all_rows(rows) == packed_twin(corpus, sequence_length)
    assert rows.lengths(np.arange(len(rows))).tolist() == [
        int((rows[i].document_ids != PADDING).sum()) for i in range(len(rows))
    ]


@given(lengths=lengths_of_documents, sequence_length=st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once(lengths: list[int], sequence_length: int) -> None:
    corpus = corpus_of(lengths)
    rows = PackedRows(corpus, sequence_length, PAD)
    found = [rows[i] for i in range(len(rows))]
    targets = np.concatenate([row.targets for row in found])
    firsts = corpus.tokens[[0, *corpus.document_ends[:-1].tolist()]]
    assert sorted(targets[targets != IGNORE_INDEX]) == sorted(set(corpus.tokens.tolist()) - set(firsts.tolist()))
    for row in found:  # no row without a target: a step of it would have no loss
        counted = row.targets != IGNORE_INDEX
        assert counted.any()
        assert (row.targets[counted] == row.input_ids[counted] + 1).all()


def trained_twin(corpus: TokenCorpus, row: Row) -> list[bool]:
    """Of each place, whether its token, which tells its place in the corpus, is one that some place predicts."""
    starts = {0, *corpus.document_ends.tolist()}
    found = []
    for token, document in zip(row.input_ids.tolist(), row.document_ids.tolist(), strict=True):
        place = token - int(corpus.tokens[0])
        is_target = document != PADDING and place not in starts
        found.append(is_target and (corpus.trained is None or bool(corpus.trained[place])))
    return found


@given(masked_corpora(), st.integers(2, 40), st.booleans())
def test_the_tokens_to_predict_are_the_targets(corpus: TokenCorpus, sequence_length: int, all_of_them: bool) -> None:
    """Of diffusion, which predicts a token where it stands: those that autoregression predicts one place before."""
    if all_of_them:
        corpus = TokenCorpus(corpus.tokens, corpus.document_ends, 0)
    rows = PackedRows(corpus, sequence_length, PAD)
    found = [rows[index] for index in range(len(rows))]
    for row in found:
        assert row.trained.tolist() == trained_twin(corpus, row)
    targets = {token for row in found for token in row.targets.tolist()} - {IGNORE_INDEX}
    # The corpus's last token may stand in no row.
    assert targets - {int(corpus.tokens[-1])} <= {
        token for row in found for token in row.input_ids[row.trained].tolist()
    }


def test_rows_out_of_range() -> None:
    rows = PackedRows(corpus_of([5, 5]), 4, PAD)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {index} of {len(rows)}"):
            rows[index]
    assert len(PackedRows(corpus_of([]), 4, PAD)) == 0


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
