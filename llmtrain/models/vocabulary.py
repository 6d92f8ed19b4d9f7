"""Whether an adapter is put on a model of its own vocabulary: on another its weights may fit, and make no sense."""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmtrain.data.tokenizer import load_tokenizer, num_ids
from llmtrain.errors import InputError
from llmtrain.models.decoder import config_field
from llmtrain.models.loading import open_config
from llmtrain.models.weights import cached

_TOKENIZER = "tokenizer_config.json"


def check_vocabulary(adapter: Path, base: str, new_rows: int, where: str) -> None:
    """Raises InputError where the tokens of an adapter's tokenizer are not those of the model that it is put on.

    Added tokens, such as those of a chat template, may be others, and those behind the model's that the adapter holds
    rows for may be new. An adapter without a tokenizer says nothing of its tokens.

    Args:
        base: directory or hub name of the model.
        new_rows: rows of the embedding or the head that the adapter's own weights have; 0 for none.
        where: what names the model.
    """
    if not (adapter / _TOKENIZER).is_file():
        return
    own = load_tokenizer(str(adapter))
    rows = config_field(open_config(base, where).get_text_config(), "vocab_size")
    words = _words(own, own.added_tokens_decoder)
    if rows is not None and max(words) >= max(rows, new_rows):
        raise _other(f"{base} has embeddings of {rows} tokens", adapter, own, where)
    if cached(base, _TOKENIZER, None) is None:
        return
    try:
        theirs = load_tokenizer(base)
    except InputError:  # it is not what will be used, and may be none to train with
        return
    added = own.added_tokens_decoder.keys() | theirs.added_tokens_decoder.keys()
    words, there = _words(own, added), _words(theirs, added)
    for token in sorted(words.keys() | there.keys()):
        if words.get(token) != there.get(token) and not (token not in there and token < new_rows):
            told = f"{base} has {num_ids(theirs)} tokens, of which {token} is {there.get(token)!r}"
            raise _other(told, adapter, own, where, f", of which {token} is {words.get(token)!r}")


def _words(tokenizer: PreTrainedTokenizerBase, without: Collection[int]) -> dict[int, str]:
    """The tokens by their ids."""
    return {index: token for token, index in tokenizer.get_vocab().items() if index not in without}


def _other(told: str, adapter: Path, own: PreTrainedTokenizerBase, where: str, rest: str = "") -> InputError:
    return InputError(
        f"{told}, and the tokenizer of the adapter in {adapter} has {num_ids(own)}{rest}: it is of another vocabulary",
        where=where,
        remedy="give the model that the adapter was trained on with --base",
    )
