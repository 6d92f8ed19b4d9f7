"""The tokenised cache: a source as memory-mapped token ids, split into train and validation.

    tokens/<key>/{train,validation}.tokens   ids of all documents one after another, uint16 or uint32
    tokens/<key>/{train,validation}.ends     int64, where each document ends (exclusive)
    tokens/<key>/manifest.json               counts, settings, size and hash of each file

The key hashes the source's content and settings, the tokenizer, the split and FORMAT.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from llmtrain.data.built import build_once
from llmtrain.data.fingerprint import fingerprint
from llmtrain.data.hashing import hash_settings, uniform
from llmtrain.data.progress import ByteProgress
from llmtrain.data.sources import describe, num_bytes, read_documents
from llmtrain.data.tokenizer import document_frame, encode_documents, hash_tokenizer, num_ids
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Source

log = logging.getLogger(__name__)

FORMAT = 1  # change it with anything that changes the tokens of a document or the files
TRAIN, VALIDATION = "train", "validation"
BATCH_CHARACTERS = 4_000_000  # text that is tokenised at a time
ENDS_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class TokenCorpus:
    """One half of a tokenised source.

    Attributes:
        tokens: ids, 1-D uint16 or uint32; a document is its tokens followed by EOS, with BOS before
            them where the tokenizer has one of its own, so at least two ids.
        document_ends: exclusive end offsets into `tokens`, 1-D int64, rising.
        num_bytes: UTF-8 bytes of the documents' text.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    document_ends: npt.NDArray[np.int64]
    num_bytes: int

    @property
    def num_documents(self) -> int:
        return len(self.document_ends)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Halves:
    """A source split by a hash of each document's text; one of the halves may be empty.

    `key` is the cache's: it changes with the text, the tokenizer and the split.
    """

    key: str
    train: TokenCorpus
    validation: TokenCorpus


def is_held_out(text: str, validation_fraction: float) -> bool:
    """Whether a document is in the validation half: its text alone decides, so it never moves."""
    return uniform(text, "split") < validation_fraction


def tokenised(
    source: Source, tokenizer: PreTrainedTokenizerBase, validation_fraction: float, cache_dir: Path
) -> Halves:
    """The tokenised source, built by this process unless it is there or another one builds it.

    Raises:
        InputError: bad input as `read_documents` tells it, or no document at all.
    """
    print_of_source = fingerprint(source, cache_dir)
    key = hash_settings([FORMAT, print_of_source, hash_tokenizer(tokenizer), validation_fraction])

    def build(directory: Path) -> dict[str, Any]:
        about = _write(source, tokenizer, validation_fraction, directory)
        if fingerprint(source, cache_dir) != print_of_source:
            message = "changed while it was being tokenised"
            raise InputError(message, where=describe(source), remedy="start again when it is complete")
        return about

    path = cache_dir / "tokens" / key
    about = build_once(path, f"tokens of {describe(source)}", build)
    return Halves(key, _open(path, TRAIN, about), _open(path, VALIDATION, about))


def _open(directory: Path, half: str, about: dict[str, Any]) -> TokenCorpus:
    counts = about[half]
    tokens = _map(directory / f"{half}.tokens", np.dtype(about["dtype"]), counts["num_tokens"])
    ends = _map(directory / f"{half}.ends", ENDS_DTYPE, counts["num_documents"])
    assert (ends[-1] if len(ends) else 0) == len(tokens), f"{directory} contradicts its manifest"
    return TokenCorpus(tokens, ends, counts["num_bytes"])


def _map(file: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    assert file.stat().st_size == length * dtype.itemsize, f"{file} contradicts its manifest"
    if not length:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r", shape=(length,))


class _HalfWriter:
    """Appends documents to the two files of one half."""

    def __init__(self, tokens: BinaryIO, ends: BinaryIO, dtype: np.dtype[Any]):
        self._tokens, self._ends, self._dtype = tokens, ends, dtype
        self.num_tokens = self.num_documents = self.num_bytes = 0

    def append(self, documents: list[list[int]], num_bytes: int) -> None:
        lengths = np.array([len(ids) for ids in documents], ENDS_DTYPE)
        ids = np.fromiter((index for ids in documents for index in ids), self._dtype, int(lengths.sum()))
        self._tokens.write(ids.data)
        self._ends.write((self.num_tokens + np.cumsum(lengths)).data)
        self.num_tokens += len(ids)
        self.num_documents += len(documents)
        self.num_bytes += num_bytes

    def counts(self) -> dict[str, int]:
        return {"num_documents": self.num_documents, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes}


def _write(
    source: Source, tokenizer: PreTrainedTokenizerBase, validation_fraction: float, directory: Path
) -> dict[str, Any]:
    """Tokenises in one pass into both halves; returns what the manifest shall say."""
    dtype = np.dtype("<u2" if num_ids(tokenizer) <= 2**16 else "<u4")
    before, after = document_frame(tokenizer)
    num_empty = 0
    what = f"tokenising {describe(source)}"
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(directory / name, "wb"))
            for half in (TRAIN, VALIDATION)
            for name in (f"{half}.tokens", f"{half}.ends")
        }
        halves = {
            half: _HalfWriter(files[f"{half}.tokens"], files[f"{half}.ends"], dtype) for half in (TRAIN, VALIDATION)
        }
        progress = stack.enter_context(ByteProgress(what, num_bytes(source)))
        for batch in _batches(read_documents(source)):
            documents: dict[str, list[list[int]]] = {TRAIN: [], VALIDATION: []}
            sizes = {TRAIN: 0, VALIDATION: 0}
            for text, ids in zip(batch, encode_documents(tokenizer, batch), strict=True):
                if not ids:  # nothing but characters that the tokenizer's normaliser removes
                    num_empty += 1
                    continue
                half = VALIDATION if is_held_out(text, validation_fraction) else TRAIN
                documents[half].append([*before, *ids, *after])
                sizes[half] += len(text.encode("utf-8"))
            for half, writer in halves.items():
                writer.append(documents[half], sizes[half])
            progress.advance(sum(sizes.values()))
    if not any(writer.num_documents for writer in halves.values()):
        remedy = "check the source: empty and whitespace-only documents do not count"
        raise InputError("the corpus is empty: no document", where=describe(source), remedy=remedy)
    _report(source, halves, num_empty, progress.seconds)
    return {
        **{half: writer.counts() for half, writer in halves.items()},
        "dtype": dtype.str,
        "source": source.model_dump(exclude={"weight"}),
        "validation_fraction": validation_fraction,
    }


def _report(source: Source, halves: dict[str, _HalfWriter], num_empty: int, seconds: float) -> None:
    num_tokens = sum(writer.num_tokens for writer in halves.values())
    size = sum(writer.num_bytes for writer in halves.values())
    text = "%s: %s train and %s held-out documents, %s tokens, %.2f bytes a token, tokenised in %.1f s"
    counts = [f"{halves[half].num_documents:,}" for half in (TRAIN, VALIDATION)]
    log.info(text, describe(source), *counts, f"{num_tokens:,}", size / num_tokens, seconds)
    if num_empty:
        log.info("%s: %d documents have no token and were skipped", describe(source), num_empty)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
