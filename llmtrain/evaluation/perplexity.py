"""Loss, perplexity and bits per byte of texts.

    loss = sum over counted tokens of -log p(x_i | x_<i) / their number

Every token of a document is counted once, but for its first where the tokenizer has no beginning-of-text token.
Windows of a longer document do not see each other, but for the overlap that the task asks for.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llmtrain.data.progress import row_progress
from llmtrain.data.sources import read_documents
from llmtrain.data.tokenizer import document_frame, encode_documents, token_byte_lengths
from llmtrain.errors import InputError
from llmtrain.evaluation.figures import Figure, exponential, ratio
from llmtrain.evaluation.tasks import LoadedTask, Perplexity
from llmtrain.models.saved import Saved
from llmtrain.recipe.schema import JSONLSource, ParquetSource, Source, TextSource

_LONGEST = 2048  # of the windows, where the task says nothing and the model takes more
_MAX_LOGITS = 1 << 26  # numbers in the logits of a batch, which are whole here: 256 MB in float32
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class _Window:
    document: int
    ids: list[int]
    counted_from: int  # the first token that is counted, as a position in ids


@dataclass
class _Document:
    nats: float = 0.0
    tokens: int = 0
    num_bytes: int = 0
    windows: list[_Window] = field(default_factory=list)


def measure(
    loaded: LoadedTask, task: Perplexity, saved: Saved, limit: int | None, batch_tokens: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The figures, and a row a document.

    Raises:
        InputError: a source is wrong or empty, or windows are longer than the model's.
    """
    length = _window_length(loaded, task, saved)
    documents = [
        _document(index, ids, length, task.overlap)
        for index, ids in enumerate(itertools.islice(_encoded(loaded, task, saved), limit))
    ]
    if not documents:
        raise InputError("the sources hold no document", where=loaded.where("data"), remedy="name texts that do")
    windows = sorted((w for d in documents for w in d.windows), key=lambda window: -len(window.ids))
    bytes_of = token_byte_lengths(saved.tokenizer)
    vocabulary = saved.decoder.get_output_embeddings().weight.shape[0]
    most = max(1, min(batch_tokens, _MAX_LOGITS // vocabulary))
    with row_progress(f"{loaded.name}: windows", len(windows)) as progress:
        while windows:
            batch = windows[: max(1, most // len(windows[0].ids))]
            windows = windows[len(batch) :]
            for window, nats in zip(batch, _nats(saved, batch), strict=True):
                document, counted = documents[window.document], window.ids[window.counted_from :]
                document.nats += nats
                document.tokens += len(counted)
                document.num_bytes += int(bytes_of[np.asarray(counted, dtype=np.int64)].sum())
            progress.advance(len(batch))
    return _figures(documents), [
        {"row": index, "nats": document.nats, "tokens": document.tokens, "bytes": document.num_bytes}
        for index, document in enumerate(documents)
    ]


def _figures(documents: list[_Document]) -> dict[str, Figure]:
    nats = [document.nats for document in documents]
    loss = ratio(nats, [document.tokens for document in documents])
    bits = [number / math.log(2) for number in nats]
    return {
        "loss": loss,
        "perplexity": exponential(loss),
        "bits_per_byte": ratio(bits, [document.num_bytes for document in documents]),
    }


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
    texts = (text for source in task.data for text in read_documents(_beside(loaded, source)))
    while group := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        for ids in encode_documents(saved.tokenizer, group):
            framed = [*before, *ids, *(after if task.end_of_text else [])]
            if len(framed) > 1:
                yield framed


def _beside(loaded: LoadedTask, source: Source) -> Source:
    """The source with its relative paths made those of the task file's directory."""
    if isinstance(source, TextSource | JSONLSource | ParquetSource):
        paths = [str(loaded.file.parent / Path(path).expanduser()) for path in source.paths]
        return source.model_copy(update={"paths": paths})
    return source


def _document(index: int, ids: list[int], length: int, overlap: int) -> _Document:
    """Cut into windows: each counts what the one before did not, the first all but the document's first token."""
    document = _Document()
    done = 1
    while done < len(ids):
        start = 0 if done == 1 else max(0, done - 1 - overlap)
        end = min(len(ids), start + length)
        document.windows.append(_Window(index, ids[start:end], done - start))
        done = end
    return document


@torch.no_grad()
def _nats(saved: Saved, batch: list[_Window]) -> list[float]:
    width = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    counted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        counted[row, window.counted_from : len(window.ids)] = True
    ids, counted = ids.to(saved.device), counted.to(saved.device)
    logits = saved.logits(ids)[:, :-1]
    # a row at a time: float32 logits of all of them would be a copy of the largest tensor there is
    return [
        float(F.cross_entropy(row[mask].float(), targets[mask], reduction="sum"))
        for row, targets, mask in zip(logits, ids[:, 1:], counted[:, 1:], strict=True)
    ]
