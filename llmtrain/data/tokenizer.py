"""Tokenizers: trained by sentencepiece or loaded, always used as Hugging Face fast tokenizers."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtrain.data.byte_pieces import byte_of_piece
from llmtrain.data.files import why_missing
from llmtrain.data.hashing import hash_settings
from llmtrain.errors import InputError
from llmtrain.recipe.resolved import check_is_no_run


def load_tokenizer(path: str, revision: str | None = None, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer with an end-of-text token.

    Args:
        path: local directory or hub name.
        revision: hub branch, tag or commit.
        gguf_file: name of a GGUF file in that directory to take the tokenizer from.

    Raises:
        InputError: it is not there, is no fast tokenizer, or has no end-of-text token.
    """
    expanded = str(Path(path).expanduser())
    local = Path(expanded)
    if not os.path.isdir(local) and (local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        message = f"{why_missing(local, 'directory')}, and no hub name"
        raise InputError(message, where=path, remedy="correct the path")
    check_is_no_run(expanded, path)
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with _unknown_models_allowed():
            tokenizer = AutoTokenizer.from_pretrained(
                expanded, revision=revision or "main", trust_remote_code=False, **gguf
            )
    except ImportError as error:
        remedy = "install it; for GGUF files: python -m pip install 'llmtrain[gguf]'"
        raise InputError(f"needs a package that is not installed: {error}", where=path, remedy=remedy) from error
    except Exception as error:
        raise InputError(
            f"holds no tokenizer that can be loaded: {error}",
            where=path,
            remedy="name a directory with a whole tokenizer.json that these versions of transformers and tokenizers "
            "read; without a network, a local one",
        ) from error
    return checked(tokenizer, path)


@contextmanager
def _unknown_models_allowed() -> Iterator[None]:
    """Without transformers' warning where the model beside a tokenizer is none of its own, such as LLaDA."""

    def is_other(record: logging.LogRecord) -> bool:
        return "You are using a model of type" not in record.getMessage()

    logger = logging.getLogger("transformers.configuration_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def checked(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer, once it is known to serve for training."""
    if not tokenizer.is_fast:
        message = f"{type(tokenizer).__name__} is no fast tokenizer, and would take days for a corpus"
        raise InputError(message, where=where, remedy="convert it to tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no eos_token: every training document ends with it, or the model never learns to stop",
            where=where,
            remedy="set eos_token in its tokenizer_config.json to a token of its vocabulary",
        )
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, in parallel, without BOS and EOS; special tokens in the text are plain text."""
    backend = tokenizer.backend_tokenizer
    # The backend itself, because the call through transformers takes twice as long. A tokenizer.json
    # may ask for truncation or padding; both would change the corpus in silence.
    backend.no_truncation()
    backend.no_padding()
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides a document's ids."""
    backend = _backend(tokenizer)
    del backend["truncation"], backend["padding"]  # not in force when documents are encoded
    return hash_settings([backend, document_frame(tokenizer)])


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before and after each document: BOS where there is one of its own, and EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(eos, int)
    return ([bos] if isinstance(bos, int) and bos != eos else []), [eos]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that is to go on: the beginning of a document."""
    before, _ = document_frame(tokenizer)
    return [*before, *tokenizer.encode(text, add_special_tokens=False)]


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for it: one more than the largest id, which may leave gaps below it."""
    largest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), 1 + largest)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up rows: the padding token, or EOS; it is never a target."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for: int32 [num_ids(tokenizer)], 0 for special tokens.

    They add up to the bytes of any text that the tokenizer neither normalises nor marks at its
    start (a leading metaspace counts as the space that it is decoded to elsewhere).
    """
    backend = _backend(tokenizer)
    kinds = _decoder_kinds(backend["decoder"])
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(num_ids(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    for piece, index in vocabulary.items():
        if index in special or (index in added and added[index]["special"]):
            continue
        lengths[index] = len(piece.encode("utf-8")) if index in added else _piece_bytes(piece, kinds)
    return lengths


def _piece_bytes(piece: str, kinds: set[str]) -> int:
    if "ByteLevel" in kinds:
        return len(piece)  # each character of the piece is one byte in disguise
    if "ByteFallback" in kinds and byte_of_piece(piece) is not None:
        return 1
    if kinds & {"Metaspace", "Replace"}:
        piece = piece.replace("▁", " ")
    elif "WordPiece" in kinds:
        piece = piece.removeprefix("##")
    return len(piece.encode("utf-8"))


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json would hold."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return backend
