"""Answers that a model writes while it is trained, to learn from them: many prompts, through the engine's own module.

Sharding engines gather a layer's weights in its forward, where all ranks meet: so every rank makes as many forwards as
the one with the most to write, and a rank that has nothing left asks for a token that nobody reads.

A token is drawn with a number of its own, a function of the prompt's seed and the token's place, so that an answer does
not depend on the prompts beside it or on the number of ranks. (Sums in another order, in batches of another size,
differ in their last bits, which can turn a near tie.)
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmtrain import distributed
from llmtrain.data.counted_random import Float64Array, uniforms
from llmtrain.models.attention import Visible
from llmtrain.models.checks import Asked
from llmtrain.models.decoder import Decoder
from llmtrain.sampling.autoregressive import GREEDY_BELOW
from llmtrain.sampling.batched import draw

_KERNELS = ("sdpa", "eager", "flex_attention")  # those that take a mask, which says where padding is


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        max_new_tokens: of an answer.
        temperature: 0 takes the most likely token.
        end_ids: tokens that end an answer, and are its last.
        max_length: prompt and answer end at this many tokens.
        vocabulary: tokens that may be written are below this number; a model may have rows for more.
        batch_tokens: about so many positions, prompts and what may follow, in a batch.
        cached: keys and values are kept; see `cache_obstacle`.
    """

    max_new_tokens: int
    temperature: float
    end_ids: Collection[int]
    max_length: int
    vocabulary: int
    batch_tokens: int
    cached: bool


@dataclass
class _Text:
    """A prompt and what was written of its answer.

    Attributes:
        index: of the prompt.
        ids: of both.
        start: where the answer begins.
        end: length at which it ends at the latest.
        numbers: float64 [limit], uniform in [0, 1).
    """

    index: int
    ids: list[int]
    start: int
    end: int
    numbers: Float64Array

    def goes_on(self, end_ids: Collection[int]) -> bool:
        return len(self.ids) < self.end and not (len(self.ids) > self.start and self.ids[-1] in end_ids)


@torch.no_grad()
def rollout(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    writing: Writing,
    device: torch.device,
) -> list[list[int]]:
    """The tokens after each prompt, with the one that ended them where one did.

    All ranks call it, each with prompts of its own, or with none.

    Args:
        model: an engine's module around a `Decoder`, in evaluation mode.
        prompts: token ids of each: at least one, and fewer than `max_length`.
        seeds: of each prompt's random numbers; 64 bits without a sign.
    """
    num_numbers = np.arange(writing.max_new_tokens)[None, :]
    numbers = uniforms(0, "rollout", np.array(seeds, np.uint64)[:, None], num_numbers)
    waiting = []
    for index, prompt in enumerate(prompts):
        end = min(len(prompt) + writing.max_new_tokens, writing.max_length)
        assert 0 < len(prompt) < end, "who asks leaves room for a token"
        waiting.append(_Text(index, list(prompt), len(prompt), end, numbers[index]))
    waiting.sort(key=lambda text: -text.end)  # the longest first: a batch too large for the memory shows at once
    answers: list[list[int]] = [[] for _ in prompts]
    while distributed.on_any_rank(bool(waiting)):
        num = _batch_size(waiting, writing.batch_tokens)
        batch, waiting = waiting[:num], waiting[num:]
        _write(model, batch, writing, device)
        for text in batch:
            answers[text.index] = text.ids[text.start :]
    return answers


def _batch_size(waiting: Sequence[_Text], batch_tokens: int) -> int:
    return max(1, batch_tokens // waiting[0].end) if waiting else 0


def _write(model: nn.Module, batch: list[_Text], writing: Writing, device: torch.device) -> None:
    reader = _Cached(model, device) if writing.cached else _Whole(model, device)
    texts = batch
    while distributed.on_any_rank(bool(texts)):
        if not texts:
            _idle(model, device)
            continue
        logits = reader.next_logits([text.ids for text in texts])[:, : writing.vocabulary]
        for text, token in zip(texts, _drawn(logits, texts, writing.temperature), strict=True):
            text.ids.append(token)
        going_on = [place for place, text in enumerate(texts) if text.goes_on(writing.end_ids)]
        if len(going_on) < len(texts):
            reader.keep(going_on)
            texts = [texts[place] for place in going_on]


def _drawn(logits: Tensor, texts: Sequence[_Text], temperature: float) -> list[int]:
    """The next token of each text, from logits [B, V]."""
    if temperature < GREEDY_BELOW:
        greedy: list[int] = logits.argmax(1).tolist()
        return greedy
    # float64, because float32 sums of 10^5 probabilities lose the tail
    probabilities = torch.softmax(logits.double() / temperature, dim=1)
    numbers = [text.numbers[len(text.ids) - text.start] for text in texts]
    uniform = torch.tensor(numbers, dtype=torch.float64)[:, None].to(logits.device)
    tokens: list[int] = draw(probabilities, uniform, 1.0).squeeze(1).tolist()
    return tokens


class _Whole:
    """Reads whole texts in every forward, padded on the right, where causal attention does not see it."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device

    def keep(self, places: Sequence[int]) -> None:
        """Nothing is kept of any text."""

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """float [B, V] after the last token of each."""
        width = max(len(ids) for ids in texts)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts], device=self._device)
        last = torch.tensor([len(ids) - 1 for ids in texts], device=self._device)
        rows = torch.arange(len(texts), device=self._device)

        def at_the_end(hidden: Tensor, head: nn.Module) -> Tensor:
            logits: Tensor = head(hidden[rows, last])
            return logits

        found: Tensor = self._model(padded, None, at_the_end)
        return found


class _Cached:
    """Reads each token once, and keeps its keys and values. Texts are padded on the left, so that all grow abreast.

    A prompt with several answers is read once for all of them.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device, self._cache = model, device, DynamicCache()

    def keep(self, places: Sequence[int]) -> None:
        """From now on only these texts are asked about."""
        self._cache.batch_select_indices(torch.tensor(places, dtype=torch.int64, device=self._device))

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """float [B, V] after the last token of each; every text is one token longer than in the call before."""
        if self._cache.get_seq_length():
            return self._read(texts)
        numbers: dict[tuple[int, ...], int] = {}
        rows = [numbers.setdefault(tuple(ids), len(numbers)) for ids in texts]
        found = self._read([list(ids) for ids in numbers])
        if len(numbers) == len(texts):
            return found
        self.keep(rows)
        return found[rows]

    def _read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        read = self._cache.get_seq_length()
        width = read + 1 if read else max(len(ids) for ids in texts)
        padding = torch.tensor([width - len(ids) for ids in texts], device=self._device)
        new = [[*[0] * (width - len(ids)), *ids][read:] for ids in texts]
        columns = torch.arange(read, width, device=self._device)
        positions = (columns[None, :] - padding[:, None]).clamp_min(0)
        found: Tensor = self._model(
            torch.tensor(new, device=self._device), positions, _at_the_last, _behind(padding), self._cache
        )
        return found


def _behind(padding: Tensor) -> Visible:
    """Causal, without the first `padding` [B] columns, of which each sees itself: what sees nothing may become NaN."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((key >= padding[row]) | (query == key))

    return visible


def _at_the_last(hidden: Tensor, head: nn.Module) -> Tensor:
    logits: Tensor = head(hidden[:, -1])
    return logits


def _idle(model: nn.Module, device: torch.device) -> None:
    """A forward of one token, for its meeting with the other ranks."""
    model(torch.zeros((1, 1), dtype=torch.int64, device=device), None, _at_the_last)


def uncompiled(decoder: Decoder) -> AbstractContextManager[object]:
    """Layers that are compiled for training run inside as they are.

    Compiled again for every length of a text they would soon reach the limit at which torch gives them up, for
    training as well. FlexAttention has no kernels but compiled ones, and stays as it is.
    """
    if decoder.hf.config._attn_implementation == "flex_attention":
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@torch.no_grad()
def cache_obstacle(asked: Asked, max_length: int) -> str | None:
    """Why this model cannot keep keys and values between forwards; None where it can.

    Known from its configuration where that says it, and else asked: two texts of unequal lengths, one token at a
    time, must give the logits that they give as wholes. All ranks call it.

    Args:
        max_length: of texts; a window of attention that is no shorter is none.
    """
    why = _known_obstacle(asked.decoder, max_length)
    if why is not None:
        return why
    texts = [[token % asked.vocabulary for token in range(first, first + 4)] for first in (3, 40)]
    texts[0].append(texts[0][0])
    cached, whole = _Cached(asked.model, asked.device), _Whole(asked.model, asked.device)
    for _ in range(3):
        if asked.differ(cached.next_logits(texts).float(), whole.next_logits(texts).float()):
            return f"{asked.kind} predicts otherwise with one"
        for ids in texts:
            ids.append((ids[-1] + 1) % asked.vocabulary)
    return None


def _known_obstacle(decoder: Decoder, max_length: int) -> str | None:
    hf, kind = decoder.hf, type(decoder.hf).__name__
    if decoder.prompt is not None:
        return "the adapter puts something before each text"
    if hf.config._attn_implementation not in _KERNELS:
        return f"attention {hf.config._attn_implementation} takes no mask"
    for layer in DynamicCache(config=hf.config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.sliding_window < max_length:
                return f"{kind} attends in windows of {layer.sliding_window} tokens, which a mask of ours would undo"
        elif type(layer) is not DynamicLayer:
            return f"{kind} carries a state that is not keys and values ({type(layer).__name__})"
    if not decoder.tells_positions:
        return f"{kind} tells positions by where tokens stand in the row, and not by position ids"
    return None
