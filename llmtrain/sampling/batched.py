"""Many completions from one model: padded on the left, longest first, with a cache, through transformers' generate.

A token is drawn from a row's own random numbers, a function of (seed, row, sample, part, position), so that what a row
gets does not depend on its neighbours or on where an interrupted command went on. (Sums in another order, in
batches of another size, differ in their last bits, which can turn a near tie.)

Rows of a batch that begin alike, as the answers to one question do, have their prompt read once.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmtrain.data.tokenizer import pad_id
from llmtrain.models.saved import Saved
from llmtrain.sampling.autoregressive import GREEDY_BELOW

_TAIL = 8  # tokens of the prompt that the text is decoded with: the first piece's space depends on what is before it
_TOKENS_A_CHARACTER = 4  # at most, where each is a byte of it
_ENOUGH = 8  # finished answers, to tell from how long others may get
_USUAL = 0.9  # of them are no longer than what is planned for


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when it ends.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus sampling (arXiv 1904.09751); 1 is off.
        stop: texts that end a completion, and are no part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, not empty, and the row and sample that its random numbers are those of.

    Attributes:
        part: of an answer that is asked for in parts; each has random numbers of its own.
        limit: new tokens at most, where that is fewer than for the others.
    """

    ids: Sequence[int]
    row: int = 0
    sample: int = 0
    part: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class Completion:
    """What came after a prompt.

    Attributes:
        text: without special tokens and stop texts.
        ids: every token that was generated, that which ended it with them.
        finish: stop where the model (or a stop text) ended it, length where the limit or the window did, filled where
            the prompt had holes: the text is then the whole, and the ids are those in the holes.
    """

    text: str
    ids: tuple[int, ...]
    finish: Literal["stop", "length", "filled"]


@dataclass
class _Row:
    """A request as it is being answered."""

    index: int
    prompt: list[int]
    limit: int
    uniforms: Tensor
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length"] | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)


class TextGenerator:
    """Answers requests with one model.

    Args:
        saved: the model; what its generation config says of sampling and penalties no longer holds.
        end_ids: tokens that end a completion.
        sampling: holds for all requests.
        batch_tokens: so many positions in a batch at most, of prompts and what follows, but for a single row. How many
            rows that holds is planned from the answers before; rows that get longer go on in smaller batches.
    """

    def __init__(self, saved: Saved, end_ids: Sequence[int], sampling: Sampling, batch_tokens: int = 8192):
        assert saved.diffusion is None, "generators.text_generator chooses the right one"
        self.sampling = sampling
        self._saved, self._end_ids, self._batch_tokens = saved, frozenset(end_ids), batch_tokens
        self._pad = pad_id(saved.tokenizer)
        self._shares = saved.virtual is None and _caches_plainly(saved.decoder.config)
        # transformers fills what a call leaves open from here: repetition penalties, samplers, a forced first token.
        saved.decoder.generation_config = GenerationConfig(pad_token_id=self._pad)

    def room(self, prompt_length: int) -> int:
        """Tokens that can follow a prompt of that length; none or fewer where it does not fit."""
        window = self._saved.window
        wanted = self.sampling.max_new_tokens
        return wanted if window is None else min(wanted, window - prompt_length)

    def settings(self) -> dict[str, Any]:
        """All that decides what is generated, beside model and prompts."""
        return asdict(self.sampling)

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether the model's window holds the prompt and one token more."""
        return self.room(len(ids)) > 0

    def generate(
        self,
        requests: Sequence[Request],
        on_done: Callable[[int, Completion], None],
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Answers all requests.

        Args:
            requests: each with room for one token at least.
            on_done: called with (index of the request, completion) as soon as one is finished.
            on_text: for a single request: called with each piece of text as it comes.
        """
        waiting = [self._row(index, request) for index, request in enumerate(requests)]
        waiting.sort(key=lambda row: -row.length)
        lengths = _Lengths()
        while waiting:
            batch = self._next_batch(waiting, lengths)
            waiting = waiting[len(batch) :]
            watch = _Watch(batch, self, len(batch) // 2 if waiting else 0, on_done, on_text)
            self._run(batch, watch)
            lengths.learn(batch)
            waiting = [row for row in batch if row.finish is None] + waiting

    def _row(self, index: int, request: Request) -> _Row:
        room = self.room(len(request.ids))
        limit = room if request.limit is None else min(room, request.limit)
        assert request.ids and limit > 0, "who asks checks that the prompt fits"
        part = f"/{request.part}" if request.part else ""
        name = f"{self.sampling.seed}/{request.row}/{request.sample}{part}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1)
        return _Row(index, list(request.ids), limit, torch.rand(limit, generator=generator, dtype=torch.float64))

    def _next_batch(self, waiting: Sequence[_Row], lengths: "_Lengths") -> list[_Row]:
        batch: list[_Row] = []
        width = 0
        for row in waiting:
            width = max(width, len(row.prompt) + lengths.expected(row))
            if batch and width * (len(batch) + 1) > self._batch_tokens:
                break
            batch.append(row)
        return batch

    def holds(self, rows: int, width: int) -> bool:
        """Whether a batch may get so wide."""
        return rows == 1 or rows * width <= self._batch_tokens

    @torch.no_grad()
    def _run(self, batch: list[_Row], watch: "_Watch") -> None:
        """Goes on with the rows until all are finished, or half of them where others wait, or they need more room."""
        processors = [] if self.sampling.is_greedy else [_Draw(batch, self.sampling)]
        inputs = self._inputs(batch)
        self._saved.decoder.generate(
            **inputs,
            **self._read_once(batch, inputs),
            max_new_tokens=max(row.limit - len(row.ids) for row in batch),
            do_sample=False,
            pad_token_id=self._pad,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([watch]),
        )

    def _read_once(self, batch: list[_Row], inputs: dict[str, Any]) -> dict[str, Any]:
        """A cache with all columns but the last, where rows are alike: it is computed of each different one.

        Nothing where all differ, or where a cache holds more than keys and values.
        """
        texts = [(*row.prompt, *row.ids) for row in batch]
        first: dict[tuple[int, ...], int] = {}
        for place, text in enumerate(texts):
            first.setdefault(text, place)
        if not self._shares or len(first) == len(batch) or min(map(len, texts)) < 2:
            return {}
        places = list(first.values())
        read = self._saved.decoder.generate(
            input_ids=inputs["input_ids"][places, :-1],
            attention_mask=inputs["attention_mask"][places, :-1],
            max_new_tokens=1,  # which nobody looks at: what reads a prompt writes a token
            do_sample=False,
            pad_token_id=self._pad,
            return_dict_in_generate=True,
        )
        cache = read.past_key_values
        self._shares = _is_plain(cache)
        if not self._shares:
            return {}
        rows = [places.index(first[text]) for text in texts]
        cache.batch_select_indices(torch.tensor(rows, device=self._saved.device))
        return {"past_key_values": cache}

    def _inputs(self, batch: list[_Row]) -> dict[str, Any]:
        saved, device = self._saved, self._saved.device
        rows, virtual = [row.prompt + row.ids for row in batch], saved.num_virtual
        width = max(len(ids) for ids in rows)
        ids = torch.tensor([[self._pad] * (width - len(ids)) + ids for ids in rows], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        if saved.virtual is None:
            return {"input_ids": ids, "attention_mask": mask}
        ones = torch.ones(len(rows), virtual, dtype=mask.dtype, device=device)
        if saved.virtual == "cache":
            # transformers cuts off the ids that the cache stands for, so there must be some.
            stand_ins = torch.full_like(ones, self._pad)
            inputs = {"input_ids": torch.cat([stand_ins, ids], 1), "attention_mask": torch.cat([ones, mask], 1)}
            return inputs | {"past_key_values": saved.virtual_cache(len(rows))}
        # The learnt embeddings stand right before the text, behind the padding: as in training, without gaps.
        embeddings = saved.decoder.get_input_embeddings()(ids)
        learnt = saved.virtual_embeddings(len(rows)).to(embeddings.dtype)
        starts = [width - len(row) for row in rows]
        parts = [torch.cat([embeddings[i, :start], learnt[i], embeddings[i, start:]]) for i, start in enumerate(starts)]
        shifted = torch.cat([mask, ones], 1)
        for i, start in enumerate(starts):
            shifted[i, start:] = 1
        return {"inputs_embeds": torch.stack(parts), "attention_mask": shifted}

    def take(self, row: _Row, token: int) -> Literal["stop", "length"] | None:
        """Adds a token to a row, and finishes it where that is its end; says how."""
        row.ids.append(token)
        if token in self._end_ids:
            row.finish = "stop"
            row.text = decode_after(self._saved.tokenizer, row.prompt, row.ids[:-1])
        elif self._stopped_by_text(row):
            row.finish = "stop"
        elif len(row.ids) >= row.limit:
            row.finish = "length"
            row.text = decode_after(self._saved.tokenizer, row.prompt, row.ids)
        return row.finish

    def _stopped_by_text(self, row: _Row) -> bool:
        stop = self.sampling.stop
        if not stop:
            return False
        longest = max(len(text) for text in stop)
        tail: str = self._saved.tokenizer.decode(
            row.ids[-_TOKENS_A_CHARACTER * longest - 1 :], skip_special_tokens=True
        )
        if not any(text in tail for text in stop):  # cheaper than the whole, at every token
            return False
        whole = decode_after(self._saved.tokenizer, row.prompt, row.ids)
        ends = [whole.find(text) for text in stop if text in whole]
        if not ends:
            return False
        row.text = whole[: min(ends)]
        return True


def _caches_plainly(config: PreTrainedConfig) -> bool:
    """As far as it can be told before a cache is filled."""
    try:
        return _is_plain(DynamicCache(config=config))
    except (AttributeError, ValueError):  # an architecture that has caches of its own only
        return False


def _is_plain(cache: Any) -> bool:
    """Whether a cache holds the keys and values of its rows, and no state of another kind."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)


def decode_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after a prompt: alone, many tokenizers would drop its leading space."""
    before = list(prompt[-_TAIL:])
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start: str = tokenizer.decode(before, **options)
    whole: str = tokenizer.decode([*before, *ids], **options)
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(list(ids), **options))  # the prompt ends within a character


class _Lengths:
    """How long answers get: a batch for the longest that is allowed would have few rows where most are short."""

    def __init__(self) -> None:
        self._seen: list[int] = []

    def learn(self, batch: Sequence[_Row]) -> None:
        """From the rows that are finished."""
        self._seen += [len(row.ids) for row in batch if row.finish is not None]
        self._seen.sort()

    def expected(self, row: _Row) -> int:
        """New tokens to have room for: more than the row has, and its limit at most."""
        if len(self._seen) < _ENOUGH:
            return row.limit
        usual = self._seen[int(_USUAL * (len(self._seen) - 1))]
        # Doubling: an answer that gets long is begun again, with its prompt, a few times only.
        return min(row.limit, max(usual, 2 * len(row.ids)))


class _Watch(StoppingCriteria):
    """Hands each new token to its row, and ends the batch when few rows go on, or when there is no room for more."""

    def __init__(
        self,
        batch: list[_Row],
        generator: TextGenerator,
        leave_at: int,
        on_done: Callable[[int, Completion], None],
        on_text: Callable[[str], None] | None,
    ):
        self._batch, self._generator, self._leave_at = batch, generator, leave_at
        self._on_done, self._on_text = on_done, on_text
        self._width = max(row.length for row in batch)
        self._shown = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self._batch, input_ids[:, -1].tolist(), strict=True):
            if row.finish is not None:
                continue
            finish = self._generator.take(row, token)
            if self._on_text is not None:
                self._show(row, self._on_text)
            if finish is not None:
                self._on_done(row.index, Completion(row.text, tuple(row.ids), finish))
        going_on = sum(row.finish is None for row in self._batch)
        self._width += 1
        ends = going_on <= self._leave_at or not self._generator.holds(len(self._batch), self._width + 1)
        return torch.full((len(self._batch),), ends, device=input_ids.device)

    def _show(self, row: _Row, on_text: Callable[[str], None]) -> None:
        text = row.text
        if row.finish is None:
            text = decode_after(self._generator._saved.tokenizer, row.prompt, row.ids)
            # A character whose bytes are not all there yet, or what may become a stop text, is held back.
            longest = max((len(stop) for stop in self._generator.sampling.stop), default=1) - 1
            text = text[: len(text) - longest].rstrip("\ufffd")
        if len(text) > self._shown:
            on_text(text[self._shown :])
            self._shown = len(text)


class _Draw(LogitsProcessor):
    """Leaves only the token that a row's next random number picks: the inverse of its distribution function."""

    def __init__(self, batch: list[_Row], sampling: Sampling):
        self._batch, self._sampling = batch, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = [row.uniforms[min(len(row.ids), row.limit - 1)] for row in self._batch]
        # float64, because float32 sums of 10^5 probabilities lose the tail
        uniform = torch.stack(numbers).to(scores.device)[:, None]
        probabilities = torch.softmax(scores.double() / self._sampling.temperature, dim=1)
        chosen = draw(probabilities, uniform, self._sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def draw(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token, [B, 1], that `uniform` [B, 1] in [0, 1) picks from the nucleus of `probabilities` [B, V]."""
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=1, descending=True)
        # the fewest that hold top_p together: each whose predecessors hold less
        probabilities = probabilities * (probabilities.cumsum(1) - probabilities < top_p)
    cumulative = probabilities.cumsum(1)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    chosen = chosen.clamp_max(probabilities.shape[1] - 1)
    return chosen if order is None else order.gather(1, chosen)
