"""What a source is made of for an algorithm, texts or examples, and how their token ids come about."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from llmtrain.data.chat import ExampleEncoder, Tokens
from llmtrain.data.formats import Example, read_examples
from llmtrain.data.groups import Judged
from llmtrain.data.hashing import hash_settings
from llmtrain.data.sources import read_documents
from llmtrain.data.tokenizer import document_frame, encode_documents, hash_tokenizer, num_ids, prompt_ids
from llmtrain.recipe.schema import DIFFUSION, KTO, Data, ProcessReward, Recipe, Source

T = TypeVar("T")


class Documents(Protocol[T]):
    """Reads the documents of sources and encodes them.

    Attributes:
        fingerprint: changes with all that decides the ids and masks of a document.
        num_ids: one more than the largest id.
        masked: whether some tokens are not trained; otherwise all are, and `Tokens.trained` is empty.
        judged: whether they are groups of answers (`data/groups.py`).
        chat_template: the one to save beside the model.
    """

    fingerprint: str
    num_ids: int
    masked: bool
    judged: bool
    chat_template: Any

    def read(self, source: Source) -> Iterator[T]:
        """The documents in a fixed order."""
        ...

    def content(self, document: T) -> str:
        """What it holds; of equal ones the later are duplicates."""
        ...

    def halved_by(self, document: T) -> str:
        """What decides whether it is held out; mostly what it holds."""
        ...

    def encode(self, documents: Sequence[T]) -> list[Tokens]:
        """Whole framed documents; no ids where nothing of one is left."""
        ...

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the model is asked, up to where it goes on."""
        ...


class Texts:
    """Texts of which every token is trained (pretraining)."""

    masked = judged = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._before, self._after = document_frame(tokenizer)
        self.fingerprint, self.num_ids = hash_tokenizer(tokenizer), num_ids(tokenizer)
        self.chat_template = tokenizer.chat_template

    def read(self, source: Source) -> Iterator[str]:
        return read_documents(source)

    def content(self, document: str) -> str:
        return document

    def halved_by(self, document: str) -> str:
        return self.content(document)

    def encode(self, documents: Sequence[str]) -> list[Tokens]:
        # No ids: a text of nothing but characters that the tokenizer's normaliser removes.
        return [
            Tokens([*self._before, *ids, *self._after] if ids else [], [])
            for ids in encode_documents(self._tokenizer, documents)
        ]

    def prompt_ids(self, prompt: str) -> list[int]:
        return prompt_ids(self._tokenizer, prompt)


class Examples:
    """Examples of which some tokens are trained (fine-tuning)."""

    masked = True
    judged = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data):
        self._encoder = ExampleEncoder(tokenizer, data.chat_template, data.train_on)
        self.fingerprint, self.num_ids = self._encoder.fingerprint, num_ids(tokenizer)
        self.chat_template = self._encoder.inference_template

    def read(self, source: Source) -> Iterator[Example]:
        return read_examples(source)

    def content(self, document: Example) -> str:
        return document.content

    def halved_by(self, document: Example) -> str:
        return self.content(document)

    def encode(self, documents: Sequence[Example]) -> list[Tokens]:
        return self._encoder.encode(documents)

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._encoder.prompt_ids(prompt)


class Filled(Generic[T]):
    """Documents, each filled with end-of-text tokens that are trained, to a multiple of `multiple` tokens.

    Args:
        longest: nothing is added beyond so many tokens; None where a document may go on in another row.
    """

    def __init__(self, documents: Documents[T], eos_id: int, multiple: int, longest: int | None):
        self._documents, self._eos_id, self._multiple, self._longest = documents, eos_id, multiple, longest
        self.fingerprint = hash_settings([documents.fingerprint, "filled", eos_id, multiple, longest])
        self.num_ids, self.chat_template = documents.num_ids, documents.chat_template
        self.masked, self.judged = documents.masked, documents.judged

    def read(self, source: Source) -> Iterator[T]:
        return self._documents.read(source)

    def content(self, document: T) -> str:
        return self._documents.content(document)

    def halved_by(self, document: T) -> str:
        return self._documents.halved_by(document)

    def encode(self, documents: Sequence[T]) -> list[Tokens]:
        return [self._filled(tokens) for tokens in self._documents.encode(documents)]

    def _filled(self, tokens: Tokens) -> Tokens:
        length = len(tokens.ids)
        num = -length % self._multiple
        if self._longest is not None:
            num = max(0, min(num, self._longest - length))
        return Tokens([*tokens.ids, *[self._eos_id] * num], [*tokens.trained, *[True] * (num if self.masked else 0)])

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._documents.prompt_ids(prompt)


def documents_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Documents[Any]:
    """What the recipe's algorithm reads."""
    algorithm = recipe.algorithm
    if isinstance(algorithm, ProcessReward):
        return Judged(tokenizer, recipe.data, "steps", algorithm.separator)
    if recipe.compares:
        return Judged(tokenizer, recipe.data, "labelled" if isinstance(algorithm, KTO) else "compared")
    documents: Documents[Any] = Examples(tokenizer, recipe.data) if recipe.fine_tunes else Texts(tokenizer)
    if not isinstance(algorithm, DIFFUSION) or algorithm.filled_to is None:
        return documents
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return Filled(documents, eos, algorithm.filled_to, recipe.sequence_length if recipe.fine_tunes else None)
