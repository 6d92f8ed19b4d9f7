"""The tokenised cache: a source as memory-mapped token ids, split into train and validation.

    tokens/<key>/{train,validation}.tokens   ids of all documents one after another, uint16 or uint32
    tokens/<key>/{train,validation}.ends     int64, where each document ends (exclusive)
    tokens/<key>/manifest.json               counts, settings, size and hash of each file

and for fine-tuning

    tokens/<key>/{train,validation}.trained  uint8 for each token, 1 where it is trained
    tokens/<key>/{train,validation}.numbers  int64 for each document, which of the source's examples it is

and for answers that were judged, whose tokens have the marks of `data/groups.py` in place of 0 and 1,

    tokens/<key>/{train,validation}.values       float32, two for each answer or step that was judged
    tokens/<key>/{train,validation}.value_ends   int64 for each document, where its answers end (exclusive)

The key hashes the source's content and settings, the encoding, the split, deduplication and FORMAT.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from llmtrain.data.built import build_once
from llmtrain.data.chat import Tokens
from llmtrain.data.documents import Documents
from llmtrain.data.duplicates import Duplicates
from llmtrain.data.fingerprint import fingerprint
from llmtrain.data.hashing import hash_settings, uniform
from llmtrain.data.progress import byte_progress
from llmtrain.data.sources import describe, num_bytes
from llmtrain.errors import InputError
from llmtrain.recipe.schema import HuggingFaceSource, ParquetSource, Source

log = logging.getLogger(__name__)

FORMAT = 3  # change it with anything that changes the tokens of a document or the files
TRAIN, VALIDATION = "train", "validation"
BATCH_CHARACTERS = 4_000_000  # text that is tokenised at a time
INT64 = np.dtype("<i8")
FLOAT32 = np.dtype("<f4")
T = TypeVar("T")


@dataclass(frozen=True)
class TokenCorpus:
    """One half of a tokenised source.

    Attributes:
        tokens: ids, 1-D uint16 or uint32; a document is its tokens followed by EOS, with BOS before
            them where the tokenizer has one of its own, so at least two ids (of an example: one).
        document_ends: exclusive end offsets into `tokens`, 1-D int64, rising.
        num_bytes: UTF-8 bytes of the documents' text.
        trained: uint8 like `tokens`, 0 for tokens that are read and not learnt; None where all are trained.
        numbers: int64 like `document_ends`, which of the source's examples each document is, from 0; None
            for texts.
        judged: what was judged in each document; None where nothing was.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    document_ends: npt.NDArray[np.int64]
    num_bytes: int
    trained: npt.NDArray[np.uint8] | None = None
    numbers: npt.NDArray[np.int64] | None = None
    judged: "Judgements | None" = None

    @property
    def num_documents(self) -> int:
        return len(self.document_ends)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def lengths(self, first: int = 0, last: int | None = None) -> npt.NDArray[np.int64]:
        """Tokens of the documents first to last."""
        ends = self.document_ends[first:last]
        before = self.document_ends[first - 1] if first else 0
        lengths: npt.NDArray[np.int64] = np.diff(ends, prepend=before)
        return lengths


@dataclass(frozen=True)
class Judgements:
    """Values of answers, or of steps.

    Attributes:
        values: float32 [answers, 2]; see `data/groups.py`.
        ends: int64 [documents], where the answers of each end (exclusive).
    """

    values: npt.NDArray[np.float32]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Halves:
    """A source split by a hash of each document's content; one of the halves may be empty.

    Attributes:
        key: the cache's; it changes with the text, its encoding, the split and deduplication.
        num_duplicates: documents that were left out because they had been there before.
        num_empty: documents that were left out because they have no token.
        nothing_to_learn: documents that were left out, and why; each kind with how many there are and the first
            one's number in the source.
    """

    key: str
    train: TokenCorpus
    validation: TokenCorpus
    num_duplicates: int
    num_empty: int
    nothing_to_learn: dict[str, tuple[int, int]]


def is_held_out(text: str, validation_fraction: float) -> bool:
    """Whether a document is in the validation half: what it holds (or its prompt) alone decides, so it never moves."""
    return uniform(text, "split") < validation_fraction


def tokenised(
    source: Source,
    documents: Documents[T],
    validation_fraction: float,
    cache_dir: Path,
    deduplicate: bool = False,
) -> Halves:
    """The tokenised source, built by this process unless it is there or another one builds it.

    Raises:
        InputError: bad input as `documents.read` tells it, or no document at all.
    """
    print_of_source = fingerprint(source, cache_dir)
    settings = {
        "source": source.model_dump(exclude={"weight"}),
        "validation_fraction": validation_fraction,
        "deduplicate": deduplicate,
    }
    key = hash_settings([FORMAT, print_of_source, documents.fingerprint, validation_fraction, deduplicate])

    def build(directory: Path) -> dict[str, Any]:
        about = _write(source, documents, validation_fraction, deduplicate, directory)
        if fingerprint(source, cache_dir) != print_of_source:
            message = "changed while it was being tokenised"
            raise InputError(message, where=describe(source), remedy="start again when it is complete")
        return {**about, **settings}

    path = cache_dir / "tokens" / key
    about = build_once(path, f"tokens of {describe(source)}", build)
    train, validation = (_open(path, half, about) for half in (TRAIN, VALIDATION))
    nothing = {why: (num, first) for why, (num, first) in about["nothing_to_learn"].items()}
    return Halves(key, train, validation, about["num_duplicates"], about["num_empty"], nothing)


def _open(directory: Path, half: str, about: dict[str, Any]) -> TokenCorpus:
    counts = about[half]
    num_tokens, num_documents = counts["num_tokens"], counts["num_documents"]
    tokens = map_array(directory / f"{half}.tokens", np.dtype(about["dtype"]), num_tokens)
    ends = map_array(directory / f"{half}.ends", INT64, num_documents)
    assert (ends[-1] if len(ends) else 0) == len(tokens), f"{directory} contradicts its manifest"
    if not about["masked"]:
        return TokenCorpus(tokens, ends, counts["num_bytes"])
    trained = map_array(directory / f"{half}.trained", np.dtype(np.uint8), num_tokens)
    numbers = map_array(directory / f"{half}.numbers", INT64, num_documents)
    judged = None
    if about["judged"]:
        value_ends = map_array(directory / f"{half}.value_ends", INT64, num_documents)
        num_values = int(value_ends[-1]) if len(value_ends) else 0
        values = map_array(directory / f"{half}.values", FLOAT32, 2 * num_values).reshape(-1, 2)
        judged = Judgements(values, value_ends)
    return TokenCorpus(tokens, ends, counts["num_bytes"], trained, numbers, judged)


def map_array(file: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    """A 1-D array in a file, read where it is looked at."""
    assert file.stat().st_size == length * dtype.itemsize, f"{file} contradicts its manifest"
    if not length:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r", shape=(length,))


class _HalfWriter:
    """Appends documents to the files of one half."""

    def __init__(
        self,
        tokens: BinaryIO,
        ends: BinaryIO,
        dtype: np.dtype[Any],
        masks: tuple[BinaryIO, BinaryIO] | None,
        judged: tuple[BinaryIO, BinaryIO] | None,
    ):
        self._tokens, self._ends, self._dtype, self._masks, self._judged = tokens, ends, dtype, masks, judged
        self.num_tokens = self.num_documents = self.num_bytes = self.num_trained = self.num_values = 0

    def append(self, documents: list[Tokens], numbers: list[int], num_bytes: int) -> None:
        lengths = np.array([len(document.ids) for document in documents], INT64)
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(document.ids for document in documents), self._dtype, total)
        self._tokens.write(ids.data)
        self._ends.write((self.num_tokens + np.cumsum(lengths)).data)
        if self._masks is not None:
            trained = np.fromiter(chain.from_iterable(document.trained for document in documents), np.uint8, total)
            self._masks[0].write(trained.data)
            self._masks[1].write(np.array(numbers, INT64).data)
            self.num_trained += int((trained & 1).sum(dtype=np.int64))
        if self._judged is not None:
            counts = np.array([len(document.values) for document in documents], INT64)
            values = [value for document in documents for value in document.values]
            self._judged[0].write(np.array(values, FLOAT32).tobytes())
            self._judged[1].write((self.num_values + np.cumsum(counts)).astype(INT64).tobytes())
            self.num_values += len(values)
        self.num_tokens += total
        self.num_documents += len(documents)
        self.num_bytes += num_bytes

    def counts(self) -> dict[str, int]:
        return {"num_documents": self.num_documents, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes}


@dataclass
class _LeftOut:
    """Documents that are not in the corpus."""

    num_duplicates: int = 0
    num_empty: int = 0
    nothing_to_learn: dict[str, tuple[int, int]] = field(default_factory=dict)


def _write(
    source: Source, documents: Documents[T], validation_fraction: float, deduplicate: bool, directory: Path
) -> dict[str, Any]:
    """Tokenises in one pass into both halves; returns what the manifest shall say."""
    dtype = np.dtype("<u2" if documents.num_ids <= 2**16 else "<u4")
    duplicates = Duplicates() if deduplicate else None
    left_out = _LeftOut()
    with ExitStack() as stack:

        def writer(half: str) -> _HalfWriter:
            def file(ending: str) -> BinaryIO:
                return stack.enter_context(open(directory / f"{half}.{ending}", "wb"))

            masks = (file("trained"), file("numbers")) if documents.masked else None
            judged = (file("values"), file("value_ends")) if documents.judged else None
            return _HalfWriter(file("tokens"), file("ends"), dtype, masks, judged)

        halves = {half: writer(half) for half in (TRAIN, VALIDATION)}
        total = _num_bytes(source, documents.masked)
        progress = stack.enter_context(byte_progress(f"tokenising {describe(source)}", total))
        for batch in _batches(documents, source):
            _append(documents, batch, duplicates, validation_fraction, halves, left_out)
            progress.advance(sum(len(entry.content.encode("utf-8")) for entry in batch))
    if not any(writer.num_documents for writer in halves.values()):
        remedy = "check the source: empty and whitespace-only documents do not count"
        if left_out.nothing_to_learn:
            reasons = left_out.nothing_to_learn.items()
            remedy += ", nor do: " + "; ".join(
                f"{num}, example {first + 1} is the first: {why}" for why, (num, first) in reasons
            )
        raise InputError("the corpus is empty: no document", where=describe(source), remedy=remedy)
    _report(source, halves, left_out, documents.masked, progress.seconds)
    return {
        **{half: writer.counts() for half, writer in halves.items()},
        "dtype": dtype.str,
        "masked": documents.masked,
        "judged": documents.judged,
        "nothing_to_learn": left_out.nothing_to_learn,
        "num_duplicates": left_out.num_duplicates,
        "num_empty": left_out.num_empty,
    }


def _num_bytes(source: Source, whole_records: bool) -> int | None:
    """For progress. What whole records of a table take, in which columns of all kinds are, nobody says."""
    if whole_records and isinstance(source, ParquetSource | HuggingFaceSource):
        return None
    return num_bytes(source)


class _Entry(NamedTuple):
    number: int  # of the document in the source, from 0
    document: Any
    content: str


def _batches(documents: Documents[T], source: Source) -> Iterator[list[_Entry]]:
    batch: list[_Entry] = []
    characters = 0
    for number, document in enumerate(documents.read(source)):
        content = documents.content(document)
        batch.append(_Entry(number, document, content))
        characters += len(content)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append(
    documents: Documents[T],
    batch: list[_Entry],
    duplicates: Duplicates | None,
    validation_fraction: float,
    halves: dict[str, _HalfWriter],
    left_out: _LeftOut,
) -> None:
    if duplicates is not None:
        are_new = duplicates.are_new([entry.content for entry in batch])
        left_out.num_duplicates += int((~are_new).sum())
        batch = [entry for entry, is_new in zip(batch, are_new.tolist(), strict=True) if is_new]
    encoded: dict[str, list[Tokens]] = {TRAIN: [], VALIDATION: []}
    numbers: dict[str, list[int]] = {TRAIN: [], VALIDATION: []}
    sizes = {TRAIN: 0, VALIDATION: 0}
    for entry, tokens in zip(batch, documents.encode([entry.document for entry in batch]), strict=True):
        if not tokens.ids and tokens.why:
            num, first = left_out.nothing_to_learn.get(tokens.why, (0, entry.number))
            left_out.nothing_to_learn[tokens.why] = (num + 1, first)
            continue
        if not tokens.ids:
            left_out.num_empty += 1
            continue
        half = VALIDATION if is_held_out(documents.halved_by(entry.document), validation_fraction) else TRAIN
        encoded[half].append(tokens)
        numbers[half].append(entry.number)
        sizes[half] += len(entry.content.encode("utf-8"))
    for half, writer in halves.items():
        writer.append(encoded[half], numbers[half], sizes[half])


def _report(source: Source, halves: dict[str, _HalfWriter], left_out: _LeftOut, masked: bool, seconds: float) -> None:
    num_tokens = sum(writer.num_tokens for writer in halves.values())
    size = sum(writer.num_bytes for writer in halves.values())
    text = "%s: %s train and %s held-out documents, %s tokens, %s, tokenised in %.1f s"
    counts = [f"{halves[half].num_documents:,}" for half in (TRAIN, VALIDATION)]
    trained = sum(writer.num_trained for writer in halves.values())
    more = f"{trained / num_tokens:.1%} of them trained" if masked else f"{size / num_tokens:.2f} bytes a token"
    log.info(text, describe(source), *counts, f"{num_tokens:,}", more, seconds)
    if left_out.num_empty:
        log.info("%s: %d documents have no token and were skipped", describe(source), left_out.num_empty)
    if left_out.num_duplicates:
        log.info("%s: %d duplicate documents were left out", describe(source), left_out.num_duplicates)
