"""From a recipe to its tokenizer and its rows: what run.py calls.

Every rank calls the same functions. File locks let one of them do the work while the others wait,
so no process group is needed; all of them see the same result.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtrain.data.built import build_once
from llmtrain.data.cache import Halves, TokenCorpus, is_held_out, tokenised
from llmtrain.data.files import why_missing
from llmtrain.data.fingerprint import fingerprint
from llmtrain.data.hashing import hash_settings
from llmtrain.data.order import MixtureOrder, Order, ShuffledOrder
from llmtrain.data.packing import PackedRows, Rows, SeparateRows
from llmtrain.data.progress import ByteProgress
from llmtrain.data.sources import describe, num_bytes, read_documents
from llmtrain.data.tokenizer import load_tokenizer, pad_id
from llmtrain.data.tokenizer_training import train_sentencepiece
from llmtrain.errors import InputError
from llmtrain.recipe.schema import (
    Data,
    ModelFromConfig,
    ModelFromGGUF,
    ModelTokenizer,
    PretrainedTokenizer,
    Recipe,
    SentencePieceTokenizer,
)

CACHE_VARIABLE = "LLMTRAIN_CACHE"
TRAINING_FORMAT = 1  # change it with anything that changes what training makes of the same text


@dataclass(frozen=True)
class Datasets:
    """The rows of a recipe.

    Attributes:
        train: rows of each training source.
        validation: held-out rows; empty where validation_fraction is 0 and no source is given.
        weights: shares of the training sources, or None to see every row once an epoch.
        fingerprint: hashes by key of the recipe: that of data.train changes with the training text, the
            tokenizer and the split; that of data.validation, where it is given, with its text and the tokenizer.
    """

    train: list[Rows]
    validation: list[Rows]
    weights: list[float] | None
    fingerprint: dict[str, str]

    def order(self, seed: int) -> Order:
        """The order of the training rows."""
        lengths = [len(rows) for rows in self.train]
        return ShuffledOrder(lengths, seed) if self.weights is None else MixtureOrder(lengths, self.weights, seed)

    def steps_per_epoch(self, global_sequences: int) -> float:
        """Optimizer steps in which as many rows are seen as there are; not rounded.

        Raises:
            InputError: the rows do not fill one step. Steps are whole, so that a run of epochs would
                train for longer than it was asked to, and see rows twice in a step.
        """
        num_rows = sum(len(rows) for rows in self.train)
        if num_rows < global_sequences:
            raise InputError(
                f"an epoch has {num_rows} rows, and one optimizer step takes {global_sequences}",
                where="epochs",
                remedy=f"lower the batch to {num_rows} rows or fewer, check that data.train names all of the text, "
                "or give steps in place of epochs",
            )
        return num_rows / global_sequences


def cache_directory(configured: str | None) -> Path:
    """Where tokenised data is kept: the recipe's, $LLMTRAIN_CACHE, or ~/.cache/llmtrain; created.

    Raises:
        InputError: it cannot be written to.
    """
    from_environment = os.environ.get(CACHE_VARIABLE)
    where = "data.cache_dir" if configured or not from_environment else f"${CACHE_VARIABLE}"
    path = Path(configured or from_environment or "~/.cache/llmtrain").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        message = f"cannot write to the cache directory {path}: {error.strerror}"
        remedy = f"set data.cache_dir or ${CACHE_VARIABLE} to a directory that you may write to"
        raise InputError(message, where=where, remedy=remedy) from None
    return path.resolve()


def prepare_tokenizer(recipe: Recipe, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer; a sentencepiece one is trained once for the same text and settings.

    Raises:
        InputError: it is not there or does not serve, or the text does not support its settings.
    """
    spec, model = recipe.tokenizer, recipe.model
    match spec:
        case SentencePieceTokenizer():
            return load_tokenizer(str(train_tokenizer(spec, recipe.data, cache_dir)))
        case PretrainedTokenizer():
            return load_tokenizer(spec.path, spec.revision)
        case ModelTokenizer():
            if isinstance(model, ModelFromGGUF):
                file = Path(model.file).expanduser()
                if not os.path.isfile(file):
                    message = f"{why_missing(file, 'file')}: {model.file}"
                    raise InputError(message, where="model.file", remedy="correct the path")
                return load_tokenizer(str(file.parent), gguf_file=file.name)
            assert not isinstance(model, ModelFromConfig), "the schema forbids it"
            return load_tokenizer(model.path, model.revision)


def train_tokenizer(spec: SentencePieceTokenizer, data: Data, cache_dir: Path) -> Path:
    """The directory of a tokenizer trained on the training half of the data."""
    held_out = _held_out_fraction(data)
    sources = [fingerprint(source, cache_dir) for source in data.train]
    key = hash_settings([TRAINING_FORMAT, sources, held_out, spec.model_dump()])

    def documents() -> Iterator[str]:
        sizes = [num_bytes(source) for source in data.train]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        with ByteProgress("reading text for the tokenizer", total) as progress:
            for source in data.train:
                for text in read_documents(source):
                    progress.advance(len(text.encode("utf-8")))
                    if not is_held_out(text, held_out):
                        yield text

    def build(directory: Path) -> dict[str, Any]:
        train_sentencepiece(documents(), spec, directory)
        return {"tokenizer": spec.model_dump(), "sources": sources}

    path = cache_dir / "tokenizers" / key
    build_once(path, "tokenizer", build)
    return path


def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Datasets:
    """The recipe's rows, tokenised unless they are in the cache.

    Raises:
        InputError: bad input, or no document to train on or to hold out.
    """
    data = recipe.data
    held_out = _held_out_fraction(data)
    halves = [tokenised(source, tokenizer, held_out, cache_dir) for source in data.train]
    for number, half in enumerate(halves):
        if not half.train.num_documents:
            message = f"all {half.validation.num_documents} documents of {describe(data.train[number])} are held out"
            remedy = "lower data.validation_fraction, or give more documents"
            raise InputError(message, where=f"data.train.{number}", remedy=remedy)
    fingerprint = {"data.train": hash_settings([half.key for half in halves])}
    if data.validation is not None:
        of_validation = [tokenised(source, tokenizer, 0.0, cache_dir) for source in data.validation]
        validation = [half.train for half in of_validation]
        fingerprint["data.validation"] = hash_settings([half.key for half in of_validation])
    else:
        validation = _validation_halves(halves, held_out)

    def rows(corpus: TokenCorpus) -> Rows:
        make = PackedRows if data.packing == "documents" else SeparateRows
        return make(corpus, recipe.sequence_length, pad_id(tokenizer))

    return Datasets(
        train=[rows(half.train) for half in halves],
        validation=[rows(corpus) for corpus in validation],
        weights=[source.weight for source in data.train if source.weight is not None] or None,
        fingerprint=fingerprint,
    )


def _held_out_fraction(data: Data) -> float:
    """Of the training sources; none where validation has sources of its own."""
    return 0.0 if data.validation is not None else data.validation_fraction


def _validation_halves(halves: list[Halves], held_out: float) -> list[TokenCorpus]:
    found = [half.validation for half in halves if half.validation.num_documents]
    if held_out > 0 and not found:
        num = sum(half.train.num_documents for half in halves)
        raise InputError(
            f"a share of {held_out} of {num} documents holds out none",
            where="data.validation_fraction",
            remedy="raise it, split the text into more documents, give data.validation, or set it to 0 for none",
        )
    return found
