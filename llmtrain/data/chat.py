"""From examples to token ids, each with whether it is trained.

    text, prompt_completion of strings   framed as data/tokenizer.document_frame does: BOS where there is one, EOS.
                                         All of a text is trained; of the others the completion and EOS.
    conversations                        as the chat template writes them, no frame. Trained are the assistant's
                                         turns, or the last one, with the token that ends the turn; never those of
                                         a prompt that has a completion.
    stepwise                             as an answer of its steps, each with the separator behind it. "Trained" is
                                         the last token of each, where the step is judged.

With data.train_on `all`, every token of every row is trained. A token that holds a trained and an
untrained character is trained, as in transformers and TRL.

What looks like a special token. In a conversation, the template writes the special tokens, and whatever
else looks like one ("<|im_end|>" in a user's question about ChatML) is text: it is encoded in pieces, so
that the model never sees a turn end where none does. Masks follow the characters that the template
wrote, so they hold in any case. (transformers and TRL take such text for the token itself.) In text and
prompt_completion of strings the record is its own template: special tokens written there are special
tokens, and BOS and EOS at its ends are not doubled.
"""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from llmtrain.data.chat_rendering import ChatRenderer, Refused, Underivable, free_characters, strings
from llmtrain.data.chat_template_files import CHOICES, NAMES, load_template, named, without_marks
from llmtrain.data.examples import (
    Conversation,
    Example,
    Labelled,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Stepwise,
    Text,
)
from llmtrain.data.formats import USUAL_NAMES
from llmtrain.data.hashing import hash_settings
from llmtrain.data.tokenizer import document_frame, hash_tokenizer, prompt_ids
from llmtrain.errors import InputError

log = logging.getLogger(__name__)

FORMAT = 3  # change it with anything that changes the ids or masks of an example
BATCH_ROWS = 512  # encoded at a time: offsets of tokens take far more memory than their ids
Span = tuple[int, int]


class Tokens(NamedTuple):
    """One document.

    Attributes:
        ids: none where it is left out.
        trained: of the same length, whether each is to be predicted; of answers that were judged, their marks
            (`data/groups.py`).
        values: of what was judged (answers or steps), as `data/groups.py` says.
        why: it was left out, where that is not because no token is left of it.
    """

    ids: list[int]
    trained: Sequence[int]
    values: Sequence[tuple[float, float]] = ()
    why: str = ""


class _Prepared(NamedTuple):
    """Text to encode.

    Attributes:
        spans: characters that are trained.
        where: place of its record.
        gap: a character that was put into what must not become a special token; its tokens are dropped.
        frame: whether BOS and EOS go around it.
        turns: whether the spans are turns, each of which must end with a token that ends it.
        learns_end: whether the EOS of a frame is trained.
        ends: of each span only the last token is marked.
    """

    text: str
    spans: list[Span]
    where: str
    gap: str | None
    frame: bool
    turns: bool
    learns_end: bool = True
    ends: bool = False


class ExampleEncoder:
    """Encodes the examples of a recipe with a tokenizer.

    Args:
        tokenizer: a fast one, with an EOS token.
        chat_template, train_on: of the recipe's section data.
        separator: stands after each step of stepwise examples; None where these are refused.

    Attributes:
        template: the chat template that conversations are written by; None where the tokenizer has none
            and the recipe names none.
        inference_template: the one to save beside the model: without marks, and the tokenizer's own
            where `template` is only its training twin.
        fingerprint: hash of everything that decides ids and masks.

    Raises:
        InputError: data.chat_template is neither a template nor a file, or is no Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        train_on: Literal["assistant", "last_assistant", "all"] = "assistant",
        separator: str | None = None,
    ):
        self._tokenizer, self._train_on, self._separator = tokenizer, train_on, separator
        self._renderer, self.inference_template = _choose(tokenizer, chat_template)
        self.template = None if self._renderer is None else self._renderer.template
        added = tokenizer.added_tokens_decoder
        self._added_ids = frozenset(added)
        special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        # One character cannot be encoded in pieces; no tokenizer is known to have a special token that short.
        self._looks_special = re.compile("|".join(re.escape(token) for token in special if len(token) > 1) or "(?!)")
        self._before, self._after = document_frame(tokenizer)
        self._warned = False
        self.fingerprint = hash_settings(
            [FORMAT, hash_tokenizer(tokenizer), tokenizer.special_tokens_map, self.template, train_on, separator]
        )

    def encode(self, examples: Sequence[Example]) -> list[Tokens]:
        """Whole documents in the order given, not cut to any length; no ids where nothing of one is left.

        Raises:
            InputError: an example of a format that is not for this, a conversation without a template or that
                the template does not write, or a turn that no token ends; with the record's place.
        """
        backend = self._tokenizer.backend_tokenizer
        # A tokenizer.json may ask for truncation or padding; both would change the rows in silence.
        backend.no_truncation()
        backend.no_padding()
        encoded: list[Tokens] = []
        for first in range(0, len(examples), BATCH_ROWS):
            prepared = [self._prepare(example) for example in examples[first : first + BATCH_ROWS]]
            before = backend.encode_special_tokens
            backend.encode_special_tokens = False
            try:
                encodings = backend.encode_batch([item.text for item in prepared], add_special_tokens=False)
            finally:
                backend.encode_special_tokens = before
            encoded += [self._tokens(*pair) for pair in zip(prepared, encodings, strict=True)]
        return encoded

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a question up to where its answer begins; without a chat template, of a text that goes on."""
        if self._renderer is None:
            return prompt_ids(self._tokenizer, prompt)
        text = self._renderer.render([{"role": "user", "content": prompt}], answer=True).text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _prepare(self, example: Example) -> _Prepared:
        match example:
            case Text():
                return self._framed("", example.text, example.where)
            case PromptCompletion():
                return self._framed(example.prompt, example.completion, example.where)
            case Conversation():
                return self._chat(example)
            case Stepwise() if self._separator is not None:
                return self._steps(example, self._separator)
        raise _not_for_sft(example)

    def _steps(self, example: Stepwise, separator: str) -> _Prepared:
        """The answer as one text, whose spans are the last character of each step with its separator."""
        steps = [step + separator for step in example.completions]
        whole = "".join(steps)
        if isinstance(example.prompt, str):
            prepared = self._framed(example.prompt, whole, example.where)
        else:
            messages = [*example.prompt, {"role": "assistant", "content": whole}]
            prepared = self._chat(Conversation(messages, example.where, num_prompt=len(example.prompt)))
        place = prepared.spans[0][0]
        # Some templates strip an answer, so that its first spaces and its last separator may be gone.
        lead = len(whole) - len(whole.lstrip())
        lost, said, start = next(
            (
                (lost, said, start)
                for lost, said in ((0, whole), (0, whole.rstrip()), (lead, whole.lstrip()), (lead, whole.strip()))
                if (start := prepared.text.find(said, place)) >= 0
            ),
            (0, "", -1),
        )
        if start < 0:
            message = "the chat template changes the steps, or they hold what looks like a special token"
            raise InputError(message, where=example.where, remedy="write them otherwise, or leave the record out")
        ends = [start + min(end - lost, len(said)) for end in accumulate(map(len, steps))]
        spans = [(end - 1, end) for end in ends]
        return prepared._replace(spans=spans, turns=False, learns_end=False, ends=True)

    def _framed(self, prompt: str, learnt: str, where: str) -> _Prepared:
        text = prompt + learnt.removesuffix(str(self._tokenizer.eos_token))
        start = len(prompt)
        if self._before and text.startswith(str(self._tokenizer.bos_token)):
            text = text.removeprefix(str(self._tokenizer.bos_token))
            start = max(0, start - len(str(self._tokenizer.bos_token)))
        return _Prepared(text, [(start, len(text))], where, gap=None, frame=True, turns=False)

    def _chat(self, example: Conversation) -> _Prepared:
        if self._renderer is None:
            raise InputError(
                "the tokenizer has no chat template to write a conversation by",
                where=example.where,
                remedy=f"set data.chat_template to {CHOICES}; base models without tokens for turns take plain",
            )
        messages, tools, gap = self._defused(example)
        spans: list[Span] = []
        try:
            if self._train_on == "all":
                text = self._renderer.text(messages, tools)
            else:
                text, spans = self._renderer.spans(messages, tools, self._train_on, example.num_prompt)
            plain = text if gap is None else self._renderer.text(example.messages, example.tools)
        except Refused as error:
            remedy = f"change the record, or choose another template by data.chat_template: {CHOICES}"
            raise InputError(f"the chat template: {error}", where=example.where, remedy=remedy) from None
        except Underivable as error:
            raise InputError(
                f"which text is the assistant's cannot be told: {error}",
                where=example.where,
                remedy="set data.chat_template to one that marks it by {% generation %} and {% endgeneration %}: "
                f"{CHOICES} (TRL has such files for many models: trl/chat_templates/*_training.jinja)",
            ) from None
        if gap is not None and text.replace(gap, "") != plain:
            message = "text that looks like a special token is taken apart by the chat template"
            raise InputError(message, where=example.where, remedy="write it otherwise, or leave the record out")
        return _Prepared(text, spans, example.where, gap, frame=False, turns=True)

    def _defused(self, example: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str | None]:
        """Messages and tools in which nothing is a special token, and the character that was put in for that."""
        held = [example.messages, example.tools]
        if not any(self._looks_special.search(text) for text in strings(held)):
            return example.messages, example.tools, None
        gap = free_characters(held, 1)
        if not self._warned:
            log.warning(
                "%s holds text that looks like a special token; there and in what follows it is encoded as text",
                example.where,
            )
            self._warned = True

        def defuse(value: Any) -> Any:
            if isinstance(value, str):
                return self._looks_special.sub(lambda found: found[0][0] + gap + found[0][1:], value)
            if isinstance(value, dict):
                return {key: defuse(item) for key, item in value.items()}
            return [defuse(item) for item in value] if isinstance(value, list) else value

        return defuse(example.messages), defuse(example.tools), gap

    def _tokens(self, item: _Prepared, encoding: Encoding) -> Tokens:
        ids: list[int] = encoding.ids
        if not ids:
            return Tokens([], [])
        if self._train_on == "all":
            trained = [True] * len(ids)
        else:
            trained = [False] * len(ids)
            offsets = encoding.offsets
            # A token whose characters are all spaces may have none left, since some tokenizers trim offsets: (7, 7).
            starts = [start if start < end else end - 1 for start, end in offsets]
            ends = [end for _, end in offsets]
            for span in item.spans:
                first, last = bisect_right(ends, span[0]), bisect_left(starts, span[1])
                if item.turns:
                    last = self._closed(item, span, ids, starts, last)
                if item.ends:  # a character may be several tokens
                    first = max(first, last - 1)
                trained[first:last] = [True] * (last - first)
        if item.gap is not None:
            ids, trained = _without_gap(item, item.gap, encoding, trained)
        if not item.frame:
            return Tokens(ids, trained)
        with_all = self._train_on == "all" or item.spans == [(0, len(item.text))]
        return Tokens(
            [*self._before, *ids, *self._after],
            [*[with_all] * len(self._before), *trained, *[item.learns_end] * len(self._after)],
        )

    def _closed(self, item: _Prepared, span: Span, ids: list[int], starts: list[int], last: int) -> int:
        """Where the turn's tokens end, with the token that ends it, which a template may write after its marks."""
        end = span[0] + len(item.text[slice(*span)].rstrip())
        final = bisect_left(starts, end) - 1
        if final >= 0 and ids[final] in self._added_ids:
            return last
        assert self._renderer is not None
        if self._renderer.marked and last < len(ids) and ids[last] in self._added_ids:
            return last + 1
        raise InputError(
            f"the chat template ends an assistant's turn by {item.text[slice(*span)][-20:]!r}, which is no token of "
            "its own, so the model would not learn to stop",
            where=item.where,
            remedy=f"use a template whose last word is a token of this tokenizer, such as {self._tokenizer.eos_token} "
            "(data.chat_template: plain writes that), or add the token to the tokenizer",
        )


def _without_gap(item: _Prepared, gap: str, encoding: Encoding, trained: list[bool]) -> tuple[list[int], list[bool]]:
    kept = []
    for index, (start, end) in enumerate(encoding.offsets):
        piece = item.text[start:end]
        if piece != gap:
            kept.append(index)
            if gap in piece:
                message = "text that looks like a special token cannot be encoded as text by this tokenizer"
                raise InputError(message, where=item.where, remedy="write it otherwise, or leave the record out")
    return [encoding.ids[index] for index in kept], [trained[index] for index in kept]


def _choose(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> tuple[ChatRenderer | None, str | None]:
    """The template to train with, and the one to save."""
    if choice is not None:
        template = load_template(choice)
        return ChatRenderer(tokenizer, template), without_marks(template)
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several by name, of which transformers takes this one
        own = own.get("default")
    if own is None:
        return None, None
    renderer = ChatRenderer(tokenizer, own)
    if renderer.keeps_prefixes():
        return renderer, own
    for name in NAMES:
        twin = ChatRenderer(tokenizer, named(name))
        if twin.agrees(renderer):
            log.info(
                "the tokenizer's chat template changes earlier turns; trained with its twin %s, which does not", name
            )
            return twin, own
    return renderer, own  # good enough for conversations of one turn, and the others say why not


def _not_for_sft(example: Example) -> InputError:
    if isinstance(example, Preference | Ranking):
        what = "answers that were compared are for reward models and preference training such as DPO"
    elif isinstance(example, Labelled):
        what = "an answer with a label, good or bad, is for algorithm kto; bad ones should not be imitated"
    elif isinstance(example, PromptOnly):
        what = "a prompt without a completion is for reinforcement learning, where the model writes the answer"
    else:
        what = "an answer in steps with labels is for process reward models"
    remedy = "for sft give text, messages, sharegpt, alpaca or prompt_completion"
    if isinstance(example, Labelled):
        remedy = "keep the good ones; set `format: prompt_completion` of this source to learn all of them"
    answers = [
        name for name in USUAL_NAMES["completion"] if isinstance(example, PromptOnly) and name in example.columns
    ]
    if answers:
        remedy += (
            f"; if {answers[0]!r} is the answer to learn, set `columns: {{completion: {answers[0]}}}` of its source"
        )
    return InputError(f"{what}; algorithm sft has nothing to imitate in it", where=example.where, remedy=remedy)
