"""Training a sentencepiece vocabulary and writing it as a Hugging Face fast tokenizer.

The fast tokenizer gives sentencepiece's own ids and, beyond it, round-trips any text:

- Nothing is normalised, no space is prepended or removed, and unknown characters become bytes.
- sentencepiece writes a space as U+2581. Here the vocabulary holds real spaces, so no normaliser
  is needed, and U+2581 itself becomes bytes (sentencepiece would give it back as a space).
- Pieces such as <s> or <0x41> are never matched in text, only by their bytes.

Newlines are ordinary characters to sentencepiece: they join with punctuation ("):\\n"), and runs
of spaces are pieces, so that a line of Python costs its words and one or two tokens more. A tab is
sentencepiece's own delimiter and stays a byte piece.
"""

import io
import logging
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmtrain.data.byte_pieces import BYTE_PIECES
from llmtrain.data.sampling import even_sample, pieces
from llmtrain.errors import InputError
from llmtrain.recipe.schema import SentencePieceTokenizer

log = logging.getLogger(__name__)

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
BASE_TOKENS = (UNK, BOS, EOS, PAD)  # ids 0 to 3
WORD_BOUNDARY = "▁"  # how sentencepiece writes a space
# Characters with a meaning of their own to the trainer, which would drop the sentence (U+2585, NUL)
# or take it for a space (U+2581). No piece holds them: they become bytes.
RESERVED = re.compile("[\u2581\u2585\0]")
# sentencepiece's BPE trainer counts positions inside a word in 16 bits.
SENTENCE_CHARACTERS = 4000
# Fixed, because the sums of unigram's EM are added up thread by thread.
NUM_THREADS = 4
MODEL_FILE = "sentencepiece.model"


def train_sentencepiece(documents: Iterable[str], spec: SentencePieceTokenizer, directory: Path) -> None:
    """Trains on an even sample of the documents and writes a fast tokenizer into `directory`.

    Written are tokenizer.json, tokenizer_config.json and, for the record, sentencepiece.model.
    The same documents, in whatever order, give the same tokenizer.

    Raises:
        InputError: no text, a vocabulary size that the text does not support, bad special tokens.
    """
    _check_special_tokens(spec.special_tokens)
    sample = even_sample(documents, spec.max_bytes)
    if not any(_sentences(sample)):
        raise InputError(
            "the corpus is empty: no text to train a tokenizer on",
            where="data.train",
            remedy="check its files: empty and whitespace-only documents do not count",
        )
    num_bytes = sum(len(text.encode("utf-8")) for text in sample)
    log.info("training a %s vocabulary of %d on %.1f MB", spec.model_type, spec.vocab_size, num_bytes / 1e6)
    started = time.monotonic()
    model = _train(sample, spec)
    log.info("trained the vocabulary in %.1f s", time.monotonic() - started)
    fast_tokenizer(model, spec).save_pretrained(directory)
    (directory / MODEL_FILE).write_bytes(model)


def _check_special_tokens(tokens: list[str]) -> None:
    where, taken = "tokenizer.special_tokens", {*BASE_TOKENS, *BYTE_PIECES}
    for token in tokens:
        problem = None
        if not token or any(character.isspace() for character in token):
            problem = f"{token!r} is empty or has a space in it"
        elif RESERVED.search(token):
            problem = f"{token!r} has a character in it that sentencepiece keeps for itself"
        elif len(token) == 1:
            problem = f"{token!r} is a single character, which the vocabulary holds as text"
        if problem is not None:
            raise InputError(problem, where=where, remedy="use names such as <|user|>")
        if token in taken:
            raise InputError(f"{token!r} is there already", where=where, remedy="remove it")
        taken.add(token)


def _sentences(sample: list[str]) -> Iterator[str]:
    for text in sample:
        for part in RESERVED.split(text):
            yield from pieces(part, SENTENCE_CHARACTERS)


def _train(sample: list[str], spec: SentencePieceTokenizer) -> bytes:
    """The serialised sentencepiece model."""
    # Every literal such as <0x41> in a text must be spelt by pieces of text: see _unigram.
    required = "".join(sorted(set("".join([*BASE_TOKENS, *BYTE_PIECES, *spec.special_tokens]))))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=model,
            model_type=spec.model_type,
            vocab_size=spec.vocab_size,
            byte_fallback=True,
            required_chars=required,
            character_coverage=0.9999,  # of the characters in the text; the rarest are left to bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SENTENCE_CHARACTERS + 4,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=spec.special_tokens,
            num_threads=NUM_THREADS,
            minloglevel=2,  # errors only; they come as exceptions too
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a size beyond 32 bits
        reason = str(error).rpartition("] ")[2] or str(error)  # without the place in its source
        raise InputError(
            f"sentencepiece cannot make a vocabulary of {spec.vocab_size} from this text: {reason}",
            where="tokenizer.vocab_size",
            remedy="take a size within the bound that it names, or give it more text",
        ) from None
    return model.getvalue()


def fast_tokenizer(model: bytes, spec: SentencePieceTokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face twin of a sentencepiece model that was trained as above."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(_bpe(processor) if spec.model_type == "bpe" else _unigram(processor))
    # No piece holds a space after something else, so cutting before each run of spaces changes
    # nothing but the time: words are short, and cached.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, processor.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=spec.special_tokens,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[str], list[float | None]]:
    """By id: the pieces as real text, and their scores, None for bytes and special tokens."""
    names: list[str] = []
    scores: list[float | None] = []
    for index in range(len(processor)):
        piece = processor.id_to_piece(index)
        is_text = not (processor.is_unknown(index) or processor.is_control(index) or processor.is_byte(index))
        names.append(piece.replace(WORD_BOUNDARY, " ") if is_text else piece)
        scores.append(processor.get_score(index) if is_text else None)
    return names, scores


def _bpe(processor: sentencepiece.SentencePieceProcessor) -> models.BPE:
    """sentencepiece joins any two neighbours whose union is a piece, best score first.

    So every cut of a piece into two pieces is a merge. Bytes and special tokens take part in none.
    """
    names, scores = _vocabulary(processor)
    text_scores = {name: score for name, score in zip(names, scores, strict=True) if score is not None}
    by_rank = sorted(text_scores, key=lambda name: -text_scores[name])  # stable: ties stay in the order of ids
    merges = [
        (name[:cut], name[cut:])
        for name in by_rank
        for cut in range(1, len(name))
        if name[:cut] in text_scores and name[cut:] in text_scores
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    return models.BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True)


def _unigram(processor: sentencepiece.SentencePieceProcessor) -> models.Unigram:
    """The best path through the pieces, as in sentencepiece.

    The model would match the literal text of bytes and special tokens too. Their score is therefore
    below that of any spelling of them by single characters, all of which are in the vocabulary.
    """
    names, scores = _vocabulary(processor)
    worst = min(score for score in scores if score is not None)
    longest = max(len(name) for name, score in zip(names, scores, strict=True) if score is None)
    assert set("".join(name for name, score in zip(names, scores, strict=True) if score is None)) <= set(names)
    unmatched = (longest + 1) * min(worst, -1.0)
    vocabulary = [(name, unmatched if score is None else score) for name, score in zip(names, scores, strict=True)]
    return models.Unigram(vocabulary, processor.unk_id(), byte_fallback=True)
