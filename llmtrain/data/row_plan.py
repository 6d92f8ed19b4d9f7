"""Planning rows of whole documents: what is cut, what is left out, and what shares a row.

    rows/<key>/starts   int64 for each piece of a document, where it begins in the corpus
    rows/<key>/spans    int32 for each piece, how many tokens it touches
    rows/<key>/ends     int64 for each row, where in the pieces it ends (exclusive)

Where the stream of documents is cut into rows (packing documents), starts has one for each row instead.
A plan is computed once and kept in the cache. Documents are planned in blocks, so that memory does
not grow with the corpus; no two blocks share a row.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmtrain.data.best_fit import best_fit
from llmtrain.data.built import build_once
from llmtrain.data.cache import INT64, TokenCorpus, map_array
from llmtrain.data.hashing import hash_settings
from llmtrain.data.packing import RowPlan

FORMAT = 1  # change it with anything that changes the rows or the files
INT32 = np.dtype("<i4")
DOCUMENTS_IN_A_BLOCK = 1 << 20
TOKENS_IN_A_BLOCK = 1 << 30  # few documents may be split into many pieces
ROWS_IN_A_BLOCK = 1 << 20  # of the stream
TOKENS_AT_A_TIME = 1 << 22  # of the masks that are counted

Int64Array = npt.NDArray[np.int64]
Packing = Literal["documents", "best_fit", "none"]
Overflow = Literal["truncate", "split"]


@dataclass
class RowCounts:
    """What became of the documents of a corpus.

    Attributes:
        num_documents: all of them.
        num_tokens: of the documents in the rows, as inputs.
        num_trained: targets that count.
        longest: tokens of the longest document.
        num_truncated, num_dropped: documents that lost their end, and how many tokens that were.
        num_split: documents that go on in another row, which does not see the first.
        num_pieces_left_out: pieces of those without a trained token, which are in no row.
        num_untrained: documents without any trained token; in no row, but for packing documents.
        num_cut_off: documents of which all trained tokens were truncated; they are in no row.
        first_empty: the first of either kind, or None.
    """

    num_documents: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    longest: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_split: int = 0
    num_pieces_left_out: int = 0
    num_untrained: int = 0
    num_cut_off: int = 0
    first_empty: int | None = None

    @property
    def num_empty(self) -> int:
        return self.num_untrained + self.num_cut_off


@dataclass(frozen=True)
class PlanSettings:
    """What decides how a corpus becomes rows.

    Attributes:
        lookahead: tokens after a row's own that it predicts: 1 where each token predicts the next one, 0 where
            tokens are predicted at their own places.
    """

    packing: Packing
    overflow: Overflow
    sequence_length: int
    lookahead: Literal[0, 1] = 1


@dataclass(frozen=True)
class _Pieces:
    starts: Int64Array
    spans: Int64Array


def plan_rows(
    corpus: TokenCorpus, corpus_key: str, settings: PlanSettings, cache_dir: Path
) -> tuple[RowPlan, RowCounts]:
    """The plan for a corpus, computed by this process unless it is there or another one computes it.

    Args:
        corpus_key: names the corpus among all.
    """
    key = hash_settings([FORMAT, corpus_key, asdict(settings)])
    path = cache_dir / "rows" / key
    about = build_once(path, "plan of rows", lambda directory: _write(corpus, settings, directory))
    plan = RowPlan(
        map_array(path / "starts", INT64, about["num_pieces"]),
        map_array(path / "spans", INT32, about["num_pieces"]),
        map_array(path / "ends", INT64, about["num_rows"]),
    )
    return plan, RowCounts(**about["counts"])


def _write(corpus: TokenCorpus, settings: PlanSettings, directory: Path) -> dict[str, Any]:
    counts = RowCounts()
    num_pieces = num_rows = 0
    with (
        open(directory / "starts", "wb") as starts,
        open(directory / "spans", "wb") as spans,
        open(directory / "ends", "wb") as ends,
    ):
        for first, last in _blocks(corpus):
            pieces = _pieces(corpus, first, last, settings, counts)
            pieces, sizes = _in_rows(pieces, settings)
            starts.write(pieces.starts.astype(INT64).tobytes())
            spans.write(pieces.spans.astype(INT32).tobytes())
            ends.write((num_pieces + np.cumsum(sizes)).astype(INT64).tobytes())
            num_pieces += len(pieces.starts)
            num_rows += len(sizes)
    return {"num_pieces": num_pieces, "num_rows": num_rows, "counts": asdict(counts), "settings": asdict(settings)}


def _in_rows(pieces: _Pieces, settings: PlanSettings) -> tuple[_Pieces, Int64Array]:
    """The pieces row by row, and how many are in each row."""
    if settings.packing == "none":
        return pieces, np.ones(len(pieces.starts), np.int64)
    rows = best_fit(np.minimum(pieces.spans, settings.sequence_length), settings.sequence_length)
    by_row = np.argsort(rows, kind="stable")
    return _Pieces(pieces.starts[by_row], pieces.spans[by_row]), np.bincount(rows)


def plan_stream(
    corpus: TokenCorpus, corpus_key: str, settings: PlanSettings, cache_dir: Path
) -> tuple[Int64Array, RowCounts]:
    """Where the rows begin that the stream of documents is cut into, those without a trained target left out.

    For corpora with masks; kept and found again as plans are.
    """
    assert settings.packing == "documents" and corpus.trained is not None
    key = hash_settings([FORMAT, corpus_key, asdict(settings)])
    path = cache_dir / "rows" / key

    def write(directory: Path) -> dict[str, Any]:
        counts = RowCounts()
        for first, last in _blocks(corpus):
            _pieces(corpus, first, last, settings, counts)
        counts.num_tokens = num_rows = 0
        with open(directory / "starts", "wb") as file:
            for starts in _stream_rows(corpus, settings.sequence_length):
                file.write(starts.astype(INT64).tobytes())
                num_rows += len(starts)
                counts.num_tokens += int(np.minimum(settings.sequence_length, corpus.num_tokens - starts).sum())
        return {"num_rows": num_rows, "counts": asdict(counts), "settings": asdict(settings)}

    about = build_once(path, "plan of rows", write)
    return map_array(path / "starts", INT64, about["num_rows"]), RowCounts(**about["counts"])


def _stream_rows(corpus: TokenCorpus, sequence_length: int) -> Iterator[Int64Array]:
    assert corpus.trained is not None
    num_rows = -(-max(0, corpus.num_tokens - 1) // sequence_length)
    for first in range(0, num_rows, ROWS_IN_A_BLOCK):
        starts = np.arange(first, min(first + ROWS_IN_A_BLOCK, num_rows)) * sequence_length
        spans = np.minimum(sequence_length + 1, corpus.num_tokens - starts)
        trained = _count_trained(corpus, starts, spans)
        # Documents that begin in these rows; their first tokens are no targets.
        here = np.searchsorted(corpus.document_ends, [starts[0] + 1, starts[-1] + spans[-1]])
        begins = corpus.document_ends[slice(*here)]
        weights = corpus.trained[begins]
        trained -= np.bincount((begins - 1 - starts[0]) // sequence_length, weights, len(starts)).astype(np.int64)
        yield starts[trained > 0]


def _blocks(corpus: TokenCorpus) -> Iterator[tuple[int, int]]:
    """(first, last) documents, last exclusive; one document of any length is a block at least."""
    first = 0
    while first < corpus.num_documents:
        before = int(corpus.document_ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(corpus.document_ends, before + TOKENS_IN_A_BLOCK, side="right"))
        last = max(first + 1, min(first + DOCUMENTS_IN_A_BLOCK, fitting))
        yield first, last
        first = last


def _pieces(corpus: TokenCorpus, first: int, last: int, settings: PlanSettings, counts: RowCounts) -> _Pieces:
    """The pieces of a block's documents that have a trained target; adds to the counts."""
    lengths = corpus.lengths(first, last)
    document_starts = corpus.document_ends[first:last] - lengths
    most = settings.sequence_length + settings.lookahead if settings.packing != "documents" else int(lengths.max())
    num = np.ones(len(lengths), np.int64)
    if settings.packing != "documents" and settings.overflow == "split":
        num = np.maximum(1, -(-(lengths - settings.lookahead) // settings.sequence_length))
    document = np.repeat(np.arange(len(lengths)), num)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(num) - num, num)) * settings.sequence_length
    starts = document_starts[document] + offset
    spans = np.minimum(lengths[document] - offset, most)
    # The first token of a piece is predicted by the piece before, or, without a look ahead, by this one.
    own_first = ((offset > 0) & (settings.lookahead == 0)).astype(np.int64)
    trained = _count_trained(corpus, starts - own_first, spans + own_first)
    of_document = np.add.reduceat(trained, np.cumsum(num) - num)

    is_long = (lengths > most) if num.max() == 1 else np.zeros(len(lengths), bool)
    empty = np.flatnonzero(of_document == 0)
    beyond = _count_trained(corpus, document_starts[empty], lengths[empty])
    kept = trained > 0
    counts.num_documents += len(lengths)
    counts.longest = max(counts.longest, int(lengths.max()))
    counts.num_truncated += int(is_long.sum())
    counts.num_dropped += int((lengths - most)[is_long].sum())
    counts.num_split += int((num > 1).sum())
    counts.num_pieces_left_out += int((~kept & (of_document[document] > 0)).sum())
    counts.num_untrained += int((beyond == 0).sum())
    counts.num_cut_off += int((beyond > 0).sum())
    counts.num_trained += int(trained.sum())
    if settings.packing == "documents":
        kept = np.ones(len(kept), bool)
    counts.num_tokens += int(
        np.minimum(spans, settings.sequence_length if settings.packing != "documents" else most)[kept].sum()
    )
    if len(empty) and counts.first_empty is None:
        counts.first_empty = first + int(empty[0])
    return _Pieces(starts[kept], spans[kept])


def _count_trained(corpus: TokenCorpus, starts: Int64Array, spans: Int64Array) -> Int64Array:
    """Trained targets of each piece: among its tokens but the first. Pieces come in the corpus's order."""
    if corpus.trained is None:
        return spans - 1
    firsts, lasts = starts + 1, starts + spans
    counts = np.empty(len(starts), np.int64)
    done = 0
    while done < len(starts):
        base = int(firsts[done])
        upto = max(done + 1, int(np.searchsorted(lasts, base + TOKENS_AT_A_TIME, side="right")))
        before = np.concatenate([[0], np.cumsum(corpus.trained[base : lasts[upto - 1]], dtype=np.int64)])
        counts[done:upto] = before[lasts[done:upto] - base] - before[firsts[done:upto] - base]
        done = upto
    return counts


def empty_documents(corpus: TokenCorpus, settings: PlanSettings) -> Iterator[int]:
    """The documents that are in no row because no token of theirs is trained there; in order."""
    for first, last in _blocks(corpus):
        lengths = corpus.lengths(first, last)
        starts = corpus.document_ends[first:last] - lengths
        is_cut = settings.packing != "documents" and settings.overflow == "truncate"
        spans = np.minimum(lengths, settings.sequence_length + settings.lookahead) if is_cut else lengths
        yield from (first + np.flatnonzero(_count_trained(corpus, starts, spans) == 0)).tolist()
