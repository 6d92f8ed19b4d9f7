"""Rows of fixed length over a token corpus, computed when asked for; nothing is copied or dropped.

Every token but each document's first is the target of exactly one position. Attention stays inside
a document and a row, so position ids restart at both.
"""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import TokenCorpus

IGNORE_INDEX = -100  # a target that does not count; torch's own default
PADDING = -1  # the document id of padding
DOCUMENTS_IN_A_BLOCK = 4096

Int64Array = npt.NDArray[np.int64]


class Row(NamedTuple):
    """One row of T tokens; each field is int64 [T].

    Attributes:
        input_ids: tokens, then padding.
        targets: the next token of the same document, or IGNORE_INDEX.
        position_ids: from 0 at the start of the row and of each document; 0 in padding.
        document_ids: 0 for the row's first document, 1 for its second, ...; PADDING in padding.
    """

    input_ids: Int64Array
    targets: Int64Array
    position_ids: Int64Array
    document_ids: Int64Array


class Rows(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def _row(corpus: TokenCorpus, start: int, stop: int, ends: Int64Array, sequence_length: int, pad_id: int) -> Row:
    """The row of tokens start to stop; `ends` are those of the documents that end in (start, stop]."""
    num = stop - start
    input_ids = np.full(sequence_length, pad_id, np.int64)
    targets = np.full(sequence_length, IGNORE_INDEX, np.int64)
    position_ids = np.zeros(sequence_length, np.int64)
    document_ids = np.full(sequence_length, PADDING, np.int64)

    input_ids[:num] = corpus.tokens[start:stop]
    following = corpus.tokens[start + 1 : stop + 1]  # one short at the end of the corpus
    targets[: len(following)] = following
    targets[ends - start - 1] = IGNORE_INDEX

    is_start = np.zeros(num + 1, np.int64)  # one more, for a document that starts in the next row
    is_start[ends - start] = 1
    position = np.arange(num)
    position_ids[:num] = position - np.maximum.accumulate(position * is_start[:num])
    document_ids[:num] = np.cumsum(is_start[:num])
    return Row(input_ids, targets, position_ids, document_ids)


class PackedRows:
    """The token stream cut every `sequence_length` tokens; the last row is padded.

    A row whose last document goes on has the next row's first token as its last target. Reading a
    row costs O(sequence_length) and a binary search among the documents.
    """

    def __init__(self, corpus: TokenCorpus, sequence_length: int, pad_id: int):
        self._corpus, self._length, self._pad_id = corpus, sequence_length, pad_id

    def __len__(self) -> int:
        # The very last token ends its document, so it is no input that predicts anything: a row of
        # it alone would have no target.
        return -(-max(0, self._corpus.num_tokens - 1) // self._length)

    def __getitem__(self, index: int) -> Row:
        _check_index(index, len(self))
        corpus = self._corpus
        start = index * self._length
        stop = min(start + self._length, corpus.num_tokens)
        first, last = np.searchsorted(corpus.document_ends, [start, stop], side="right")
        return _row(corpus, start, stop, corpus.document_ends[first:last], self._length, self._pad_id)


class SeparateRows:
    """One piece of one document a row, at most `sequence_length` tokens, padded.

    The first target of a piece is its own second token; its last one is the next piece's first. A
    document of n tokens has ceil((n - 1) / sequence_length) pieces. Kept in memory is one number
    for every 4096 documents.
    """

    def __init__(self, corpus: TokenCorpus, sequence_length: int, pad_id: int):
        self._corpus, self._length, self._pad_id = corpus, sequence_length, pad_id
        blocks = range(0, corpus.num_documents, DOCUMENTS_IN_A_BLOCK)
        totals = [int(self._pieces(block)[1].sum()) for block in blocks]
        self._rows_before_block = np.concatenate([[0], np.cumsum(totals, dtype=np.int64)])

    def _pieces(self, first_document: int) -> tuple[Int64Array, Int64Array]:
        """(start offsets, numbers of pieces) of the documents of one block."""
        ends = self._corpus.document_ends[first_document : first_document + DOCUMENTS_IN_A_BLOCK]
        before = self._corpus.document_ends[first_document - 1] if first_document else 0
        starts = np.concatenate([[before], ends[:-1]])
        return starts, -(-(ends - starts - 1) // self._length)

    def __len__(self) -> int:
        return int(self._rows_before_block[-1])

    def __getitem__(self, index: int) -> Row:
        _check_index(index, len(self))
        block = int(np.searchsorted(self._rows_before_block, index, side="right")) - 1
        starts, pieces = self._pieces(block * DOCUMENTS_IN_A_BLOCK)
        rows_before = np.cumsum(pieces) - pieces
        row = index - int(self._rows_before_block[block])
        document = int(np.searchsorted(rows_before, row, side="right")) - 1
        start = int(starts[document]) + (row - int(rows_before[document])) * self._length
        first = block * DOCUMENTS_IN_A_BLOCK + document
        end = self._corpus.document_ends[first : first + 1]
        stop = min(start + self._length, int(end[0]))
        return _row(self._corpus, start, stop, end[end == stop], self._length, self._pad_id)


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")
