"""Rows of fixed length over a token corpus, computed when asked for; tokens are never copied.

Attention stays inside a document and a row, so position ids restart at both. Padding stands at a
row's end, as one more document that counts for nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import TokenCorpus

IGNORE_INDEX = -100  # a target that does not count; torch's own default
PADDING = -1  # the document id of padding

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Row(NamedTuple):
    """One row of T tokens; each field is int64 [T], `trained` is bool [T].

    Attributes:
        input_ids: tokens, then padding.
        targets: the next token of the same document, or IGNORE_INDEX where there is none or it is not trained.
        position_ids: from 0 at the start of the row, of each document and of the padding. Each 0 begins a
            document for the attention; padding of zeros alone would be a document a token.
        document_ids: 0 for the row's first document, 1 for its second, ...; PADDING in padding.
        trained: whether the token at this place is one to predict: those that are the target of some place, here
            or in the row before. A document's first token and what is only read are not.
    """

    input_ids: Int64Array
    targets: Int64Array
    position_ids: Int64Array
    document_ids: Int64Array
    trained: BoolArray


class Rows(Protocol):
    """Rows that can be read in any order.

    Attributes:
        ragged: whether rows hold so unequal numbers of tokens that micro-batches are cut to their longest.
    """

    ragged: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """What the collator of the rows takes: a `Row`, or the groups of one."""
        ...

    def lengths(self, indices: Int64Array) -> Int64Array:
        """Tokens in each of these rows, padding not counted; no token is read."""
        ...


@dataclass(frozen=True)
class RowPlan:
    """Which pieces of documents each row holds.

    A piece begins at `starts[i]` of the corpus and touches `spans[i]` tokens: at most T of them are
    inputs, and all but the first are targets. So a piece that spans T + 1 tokens has its last one as
    a target only, whether its document ends there or goes on.

    Attributes:
        starts: int64 [pieces].
        spans: int32 [pieces], 2 to T + 1.
        row_ends: int64 [rows], where in the pieces each row ends (exclusive).
    """

    starts: Int64Array
    spans: npt.NDArray[np.int32]
    row_ends: Int64Array

    def pieces_of(self, index: int) -> slice:
        """The pieces of a row."""
        return slice(int(self.row_ends[index - 1]) if index else 0, int(self.row_ends[index]))


class PlannedRows:
    """Rows of whole documents, or of pieces of those that are too long, as a plan has them."""

    def __init__(self, corpus: TokenCorpus, plan: RowPlan, sequence_length: int, pad_id: int, ragged: bool):
        self._corpus, self._plan, self._length, self._pad_id = corpus, plan, sequence_length, pad_id
        self.ragged = ragged

    def __len__(self) -> int:
        return len(self._plan.row_ends)

    def lengths(self, indices: Int64Array) -> Int64Array:
        ends = self._plan.row_ends[indices]
        firsts = np.where(indices > 0, self._plan.row_ends[indices - 1], 0)
        num = ends - firsts
        pieces = np.repeat(ends - np.cumsum(num), num) + np.arange(num.sum())
        inputs = np.minimum(self._plan.spans[pieces], self._length).astype(np.int64)
        lengths: Int64Array = np.add.reduceat(inputs, np.cumsum(num) - num) if len(indices) else np.empty(0, np.int64)
        return lengths

    def __getitem__(self, index: int) -> Row:
        _check_index(index, len(self))
        pieces = self._plan.pieces_of(index)
        row = _empty_row(self._length, self._pad_id)
        place = 0
        for document, (start, span) in enumerate(
            zip(self._plan.starts[pieces].tolist(), self._plan.spans[pieces].tolist(), strict=True)
        ):
            num = min(span, self._length)
            here = slice(place, place + num)
            row.input_ids[here] = self._corpus.tokens[start : start + num]
            row.targets[place : place + span - 1] = targets_of(self._corpus, start + 1, start + span)
            row.position_ids[here] = np.arange(num)
            row.document_ids[here] = document
            row.trained[here] = trained_of(self._corpus, start, start + num)
            place += num
        row.position_ids[place:] = np.arange(self._length - place)
        return row


class PackedRows:
    """The token stream cut every `sequence_length` tokens; the last row is padded.

    A row whose last document goes on has the next row's first token as its last target, so that every
    token but each document's first is the target of exactly one position. Reading a row costs
    O(sequence_length) and a binary search among the documents.
    """

    ragged = False

    def __init__(self, corpus: TokenCorpus, sequence_length: int, pad_id: int, starts: Int64Array | None = None):
        """`starts`: where the rows begin that shall be read, int64, multiples of `sequence_length`; by default all."""
        self._corpus, self._length, self._pad_id, self._starts = corpus, sequence_length, pad_id, starts

    def __len__(self) -> int:
        if self._starts is not None:
            return len(self._starts)
        # The very last token ends its document, so it is no input that predicts anything: a row of
        # it alone would have no target.
        return -(-max(0, self._corpus.num_tokens - 1) // self._length)

    def lengths(self, indices: Int64Array) -> Int64Array:
        starts = indices * self._length if self._starts is None else self._starts[indices]
        lengths: Int64Array = np.minimum(self._length, self._corpus.num_tokens - starts)
        return lengths

    def span(self, index: int) -> tuple[int, int]:
        """(start, stop) of a row in the corpus."""
        start = index * self._length if self._starts is None else int(self._starts[index])
        return start, min(start + self._length, self._corpus.num_tokens)

    def __getitem__(self, index: int) -> Row:
        _check_index(index, len(self))
        corpus = self._corpus
        start, stop = self.span(index)
        num = stop - start
        first, last = np.searchsorted(corpus.document_ends, [start, stop], side="right")
        ends = corpus.document_ends[first:last]  # of the documents that end in (start, stop]
        row = _empty_row(self._length, self._pad_id)
        row.input_ids[:num] = corpus.tokens[start:stop]
        following = targets_of(corpus, start + 1, stop + 1)  # one short at the end of the corpus
        row.targets[: len(following)] = following
        row.targets[ends - start - 1] = IGNORE_INDEX
        is_start = np.zeros(num + 1, np.int64)  # one more, for a document that starts in the next row
        is_start[ends - start] = 1
        position = np.arange(num)
        row.position_ids[:num] = position - np.maximum.accumulate(position * is_start[:num])
        row.position_ids[num:] = np.arange(self._length - num)
        row.document_ids[:num] = np.cumsum(is_start[:num])
        row.trained[:num] = trained_of(corpus, start, stop)
        return row


def targets_of(corpus: TokenCorpus, start: int, stop: int) -> Int64Array:
    """The tokens start to stop as targets: int64, IGNORE_INDEX where they are not trained."""
    targets = corpus.tokens[start:stop].astype(np.int64)
    if corpus.trained is not None:
        targets[corpus.trained[start:stop] == 0] = IGNORE_INDEX
    return targets


def trained_of(corpus: TokenCorpus, start: int, stop: int) -> BoolArray:
    """Which of the tokens start to stop are ones to predict: bool, never a document's first."""
    trained = np.ones(stop - start, np.bool_) if corpus.trained is None else corpus.trained[start:stop] != 0
    first, last = np.searchsorted(corpus.document_ends, [start, stop], side="left")
    begins = corpus.document_ends[first:last]  # documents that begin in [start, stop), but for the corpus's first
    trained[begins - start] = False
    if start == 0:
        trained[:1] = False
    return trained


def _empty_row(sequence_length: int, pad_id: int) -> Row:
    return Row(
        np.full(sequence_length, pad_id, np.int64),
        np.full(sequence_length, IGNORE_INDEX, np.int64),
        np.empty(sequence_length, np.int64),
        np.full(sequence_length, PADDING, np.int64),
        np.zeros(sequence_length, np.bool_),
    )


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")
