"""Small inputs that several tests of the data layer share."""

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtrain.data.cache import TokenCorpus
from llmtrain.recipe.schema import Recipe

# Any str that is text: surrogates are halves of UTF-16 pairs and have no UTF-8.
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))

AWKWARD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\tdef f(x):\n        return  x\r\n\r\n",
    "a\0b",
    "😀👩‍👩‍👧 e\u0301 ﬁ Å İ",
    "▁ is U+2581 ▁▁, and ▅ is U+2585",
    "<s>literal</s> <unk><pad> <|user|> <0x41><0x0A> <0x",
    "\ufeffBOM \U0010ffff \ufffe \u200b\u00a0",
    "#" * 50 + "\n" + " " * 37 + "x" + "\t" * 9,
    "héllo wörld, 你好世界, привет",
]


def corpus_of(lengths: list[int], first_token: int = 10, trained: list[bool] | None = None) -> TokenCorpus:
    """Documents of these lengths, in which every token has its own id."""
    ends = np.cumsum(lengths, dtype=np.int64)
    num = int(ends[-1]) if lengths else 0
    tokens = np.arange(first_token, first_token + num, dtype=np.uint32)
    if trained is None:
        return TokenCorpus(tokens, ends, num_bytes=0)
    return TokenCorpus(tokens, ends, 0, np.array(trained, np.uint8), np.arange(len(lengths), dtype=np.int64))


def byte_level_tokenizer(texts: list[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A GPT-2 style tokenizer: BPE on bytes, one token for the start and end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def text_documents(num: int) -> list[str]:
    """Different short documents of words and code."""
    return [f"document {i}: {'word ' * (i % 7)}\nif x == {i * i}:\n    return {i}\n" for i in range(num)]


def recipe(**sections: Any) -> Recipe:
    """A small valid recipe with some sections replaced."""
    values: dict[str, Any] = {
        "name": "test",
        "sequence_length": 16,
        "steps": 4,
        "batch": {"sequences": 4},
        "model": {"kind": "config", "architecture": "llama"},
        "tokenizer": {"kind": "sentencepiece", "vocab_size": 320},
        "algorithm": {"kind": "causal_lm"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
    }
    return Recipe.model_validate({**values, **sections})


def write_lines(path: Path, texts: list[str]) -> Path:
    """A text file in which each line is a document."""
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")
    return path
