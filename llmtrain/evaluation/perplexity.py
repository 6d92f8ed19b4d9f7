"""Loss, perplexity and bits per byte of texts.

    loss = sum over counted tokens of -log p(x_i | x_<i) / their number

Every token of a document is counted once, but for its first where the tokenizer has no beginning-of-text token.
Windows of a longer document do not see each other, but for the overlap that the task asks for.

Of diffusion models they are upper bounds, of the same windows and tokens. Each document's bound is an estimate of
its own, so that the errors, which come from how documents differ, hold both: which texts were asked for, and the
draws of noise. How much of it is the noise is told apart (Cochran, Sampling Techniques, 10.3: two-stage sampling).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmtrain.data.cache import is_held_out
from llmtrain.data.progress import row_progress
from llmtrain.data.sources import read_documents
from llmtrain.data.tokenizer import document_frame, encode_documents, token_byte_lengths
from llmtrain.errors import InputError
from llmtrain.evaluation.figures import Figure, exponential, ratio
from llmtrain.evaluation.scoring import Scorer, Span, estimated, score, scorer_for
from llmtrain.evaluation.tasks import LoadedTask, Perplexity
from llmtrain.models.saved import Saved
from llmtrain.recipe.schema import JSONLSource, ParquetSource, Source, TextSource

_LONGEST = 2048  # of the windows, where the task says nothing and the model takes more
_ENCODED_AT_ONCE = 256


class _Window(NamedTuple):
    """A part of a document.

    Attributes:
        ids: its tokens.
        first: the first place that is counted.
        num_fill: tokens at its end that fill up a block: predicted with it, and no tokens of the text.
    """

    ids: list[int]
    first: int
    num_fill: int


@dataclass
class _Document:
    nats: float = 0.0
    variance: float = 0.0
    tokens: int = 0
    num_bytes: int = 0
    windows: list[_Window] = field(default_factory=list)


def measure(
    loaded: LoadedTask, task: Perplexity, saved: Saved, limit: int | None, batch_tokens: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The figures, and a row a document.

    Raises:
        InputError: a source is wrong or empty, windows are longer than the model's, or the method is not for it.
    """
    length = _window_length(loaded, task, saved)
    scorer = scorer_for(loaded, task, saved)
    encoded = itertools.islice(_encoded(loaded, task, saved), limit)
    documents = [_document(ids, length, task.overlap) for ids in encoded]
    if task.end_of_text and saved.diffusion is not None and saved.diffusion.block_size is not None:
        _fill(documents, saved.diffusion.block_size, length, saved.tokenizer.eos_token_id)
    if not documents:
        raise InputError("the sources hold no document", where=loaded.where("data"), remedy="name texts that do")
    owners = [document for document in documents for _ in document.windows]
    windows = [window for document in documents for window in document.windows]
    spans = [_span(window, key, scorer.mask_id) for key, window in enumerate(windows)]
    with row_progress(f"{loaded.name}: windows", len(spans) * scorer.samples) as progress:
        drawn = score(scorer, spans, batch_tokens, progress.advance)
    bytes_of = token_byte_lengths(saved.tokenizer)
    for document, window, span, nats, variance in zip(owners, windows, spans, *estimated(scorer, drawn), strict=True):
        document.nats += float(nats)
        document.variance += float(variance)
        document.tokens += int(span.counted.sum()) - window.num_fill
        document.num_bytes += int(bytes_of[span.ids[span.counted]].sum())
    return _figures(documents, scorer), [_record(index, document, scorer) for index, document in enumerate(documents)]


def _fill(documents: Sequence[_Document], block_size: int, length: int, eos_id: int) -> None:
    """Fills each document's last block with end-of-text tokens, as block diffusion is trained with.

    A text that ends anywhere in a block is one that ends in such tokens to its end. What they cost belongs to the
    text's end; they are no tokens more.
    """
    for document in documents:
        last = document.windows[-1]
        num = min(-len(last.ids) % block_size, length - len(last.ids))
        document.windows[-1] = _Window([*last.ids, *[eos_id] * num], last.first, num)


def _span(window: _Window, key: int, mask_id: int | None) -> Span:
    """What is predicted of a window; a mask that is itself text cannot be."""
    tokens = np.asarray(window.ids, dtype=np.int64)
    predicted = np.arange(len(tokens)) >= window.first
    return Span(tokens, predicted & (tokens != (-1 if mask_id is None else mask_id)), key)


def _record(index: int, document: _Document, scorer: Scorer) -> dict[str, Any]:
    record = {"row": index, "nats": document.nats, "tokens": document.tokens, "bytes": document.num_bytes}
    if scorer.exact or math.isnan(document.variance):
        return record
    return {**record, "nats_stderr": math.sqrt(document.variance)}


def _figures(documents: list[_Document], scorer: Scorer) -> dict[str, Figure]:
    nats, tokens = [document.nats for document in documents], [document.tokens for document in documents]
    loss = ratio(nats, tokens)
    bits = [number / math.log(2) for number in nats]
    figures = {
        "loss": loss,
        "perplexity": exponential(loss),
        "bits_per_byte": ratio(bits, [document.num_bytes for document in documents]),
    }
    figures = {name: figure._replace(note=scorer.note) for name, figure in figures.items()}
    variance = math.fsum(document.variance for document in documents)
    if not scorer.exact and not math.isnan(variance) and any(tokens):
        error = math.sqrt(variance) / sum(tokens)
        figures["monte_carlo_error"] = Figure(error, None, len(documents), "of the loss, within its stderr")
    return figures


def _window_length(loaded: LoadedTask, task: Perplexity, saved: Saved) -> int:
    longest = saved.window
    if task.sequence_length is None:
        length = _LONGEST if longest is None else min(longest, _LONGEST)
        return max(length, task.overlap + 2)
    if longest is not None and task.sequence_length > longest:
        raise InputError(
            f"{task.sequence_length} tokens, and the model's window is {longest}",
            where=loaded.where("sequence_length"),
            remedy=f"use {longest} or less",
        )
    return task.sequence_length


def _encoded(loaded: LoadedTask, task: Perplexity, saved: Saved) -> Iterator[list[int]]:
    before, after = document_frame(saved.tokenizer)
    texts = (text for source in task.data for text in read_documents(beside(loaded.file.parent, source)))
    if task.held_out_fraction is not None:
        share = task.held_out_fraction
        texts = (text for text in texts if is_held_out(text, share))
    while group := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        for ids in encode_documents(saved.tokenizer, group):
            framed = [*before, *ids, *(after if task.end_of_text else [])]
            if len(framed) > 1:
                yield framed


def beside(directory: Path, source: Source) -> Source:
    """The source with its relative paths made those of the directory."""
    if isinstance(source, TextSource | JSONLSource | ParquetSource):
        paths = [str(directory / Path(path).expanduser()) for path in source.paths]
        return source.model_copy(update={"paths": paths})
    return source


def _document(ids: list[int], length: int, overlap: int) -> _Document:
    """Cut into windows: each counts what the one before did not, the first all but the document's first token."""
    document = _Document()
    done = 1
    while done < len(ids):
        start = 0 if done == 1 else max(0, done - 1 - overlap)
        end = min(len(ids), start + length)
        document.windows.append(_Window(ids[start:end], done - start, 0))
        done = end
    return document
