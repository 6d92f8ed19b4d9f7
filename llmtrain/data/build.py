"""From a recipe to its tokenizer and its rows: what run.py calls.

Every rank calls the same functions. File locks let one of them do the work while the others wait,
so no process group is needed; all of them see the same result.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llmtrain.data.built import build_once
from llmtrain.data.cache import is_held_out
from llmtrain.data.documents import Documents
from llmtrain.data.files import why_missing
from llmtrain.data.fingerprint import fingerprint
from llmtrain.data.grouping import LengthGroupedOrder
from llmtrain.data.hashing import hash_settings
from llmtrain.data.order import MixtureOrder, Order, ShuffledOrder, tempered
from llmtrain.data.packing import Rows
from llmtrain.data.prepared import Prepared, check_labels, check_trained, held_out_fraction, prepare_sources, report
from llmtrain.data.progress import byte_progress
from llmtrain.data.sources import describe, num_bytes, read_documents
from llmtrain.data.tokenizer import load_tokenizer
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
from llmtrain.recipe.schema.data import LEAST_RATIO_OF_WEIGHTS

CACHE_VARIABLE = "LLMTRAIN_CACHE"
TRAINING_FORMAT = 1  # change it with anything that changes what training makes of the same text


@dataclass(frozen=True)
class Datasets:
    """The rows of a recipe.

    Attributes:
        documents: what read and encoded the text; it also encodes prompts, and has the chat template to save.
        train: rows of each training source.
        validation: held-out rows; empty where validation_fraction is 0 and no source is given.
        weights: shares of the training sources, or None to see every row once an epoch.
        fingerprint: hashes by key of the recipe: that of data.train changes with the training text, its
            encoding (tokenizer, chat template, what is trained), the split and how rows are made and ordered; that
            of data.validation, where it is given, with its text, the encoding and how rows are made.
        grouped_sequences: the global batch, in which rows have about the same length; None where they need not.
    """

    documents: Documents[Any]
    train: list[Rows]
    validation: list[Rows]
    weights: list[float] | None
    fingerprint: dict[str, str]
    grouped_sequences: int | None = None

    def order(self, seed: int) -> Order:
        """The order of the training rows."""
        lengths = [len(rows) for rows in self.train]
        order = ShuffledOrder(lengths, seed) if self.weights is None else MixtureOrder(lengths, self.weights, seed)
        if self.grouped_sequences is None:
            return order
        return LengthGroupedOrder(order, self.train, self.grouped_sequences, seed)

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


class PreparedTokenizer(NamedTuple):
    """A tokenizer, and how many of its last ids are tokens that the recipe added to it."""

    tokenizer: PreTrainedTokenizerBase
    num_new: int


def prepare_tokenizer(recipe: Recipe, cache_dir: Path) -> PreparedTokenizer:
    """The recipe's tokenizer; a sentencepiece one is trained once for the same text and settings.

    Raises:
        InputError: it is not there or does not serve, or the text does not support its settings.
    """
    spec = recipe.tokenizer
    tokenizer = _loaded_tokenizer(recipe, cache_dir)
    added = [] if isinstance(spec, SentencePieceTokenizer) else list(spec.add_tokens)
    _add_tokens(tokenizer, added)
    mask = recipe.mask_token
    if mask is not None:
        if mask not in tokenizer.get_vocab():
            _add_tokens(tokenizer, [mask], "algorithm.mask_token")
            added.append(mask)
        tokenizer.mask_token = mask
    return PreparedTokenizer(tokenizer, len(added))


def _loaded_tokenizer(recipe: Recipe, cache_dir: Path) -> PreTrainedTokenizerBase:
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


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], where: str = "tokenizer.add_tokens") -> None:
    """Adds special tokens: a chat template writes them, and the same characters in a text do not."""
    for token in tokens:
        if not token or token != token.strip():
            message = f"{token!r} is empty, or begins or ends with a space"
            raise InputError(message, where=where, remedy="use names such as <|user|>")
        if token in tokenizer.get_vocab():
            raise InputError(f"{token!r} is there already", where=where, remedy="remove it")
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)


def train_tokenizer(spec: SentencePieceTokenizer, data: Data, cache_dir: Path) -> Path:
    """The directory of a tokenizer trained on the training half of the data."""
    held_out = held_out_fraction(data)
    sources = [fingerprint(source, cache_dir) for source in data.train]
    key = hash_settings([TRAINING_FORMAT, sources, held_out, spec.model_dump()])

    def documents() -> Iterator[str]:
        sizes = [num_bytes(source) for source in data.train]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        with byte_progress("reading text for the tokenizer", total) as progress:
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
        InputError: bad input, no document to train on or to hold out, too many without a trained token, or only good
            or only bad answers where both are needed.
    """
    prepared = prepare_sources(recipe, tokenizer, cache_dir)
    for half in [*prepared.train, *prepared.validation]:
        check_trained(half, recipe)
        report(half, recipe)
    check_labels(prepared.train, recipe)
    return datasets_of(prepared, recipe)


def datasets_of(prepared: Prepared, recipe: Recipe) -> Datasets:
    """The rows without what became of the documents."""
    train = [half.rows for half in prepared.train]
    return Datasets(
        documents=prepared.documents,
        train=train,
        validation=[half.rows for half in prepared.validation],
        weights=_weights(recipe.data, [len(rows) for rows in train]),
        fingerprint=prepared.fingerprint,
        grouped_sequences=recipe.global_sequences if recipe.data.group_by_length else None,
    )


def _weights(data: Data, num_rows: list[int]) -> list[float] | None:
    if data.temperature is None:
        return [source.weight for source in data.train if source.weight is not None] or None
    weights = tempered(num_rows, data.temperature)
    if min(weights) < LEAST_RATIO_OF_WEIGHTS:
        raise InputError(
            f"{data.temperature:g} gives {describe(data.train[weights.index(min(weights))])} a share that no run would "
            f"draw from; sources have {', '.join(str(num) for num in num_rows)} rows",
            where="data.temperature",
            remedy="raise it to 1 or more, or leave the source out",
        )
    return weights
