"""Many completions from a diffusion model: batched, each row with random numbers of its own, as in `batched.py`.

A completion is written into as many places as may follow the prompt (of a model with blocks, whole blocks), and
ends at its first end token or stop text; a row is left alone as soon as nothing before its end is open. In a prompt
with holes, which are mask tokens, the holes are filled, and nothing follows. A hole before given text becomes no
token that ends a text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.data.tokenizer import pad_id
from llmtrain.models.decoder import Decoder
from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request, Sampling, decode_after
from llmtrain.sampling.canvas import Canvas, Draft, lay_out, to_continue
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.drawing import Draws, write_texts
from llmtrain.sampling.infilling import holes
from llmtrain.sampling.samplers import Unmasking
from llmtrain.sampling.writing import Work

OnDone = Callable[[int, Completion], None]
OnText = Callable[[str], None]


class Step(NamedTuple):
    """A text as it is being written, to look at: token ids, which places are open, and which were just written."""

    ids: list[int]
    open: list[bool]
    new: list[bool]


@dataclass(eq=False)
class _Row:
    """A request as it is being answered.

    Attributes:
        prompt: what comes before the first open place.
        limit: tokens of the completion.
        fills: the open places are holes in a prompt.
        written: places before the first open one, when that was last looked at.
    """

    index: int
    name: tuple[int, int]
    draft: Draft
    prompt: list[int]
    limit: int
    fills: bool
    written: int = 0
    done: Completion | None = None

    def ends_excluded(self) -> list[int]:
        """Holes that have given text behind them."""
        if not self.fills:
            return []
        holes = set(self.draft.open)
        last_given = max(place for place in range(-1, len(self.draft.ids)) if place not in holes)
        return [place for place in self.draft.open if place < last_given]


class DiffusionGenerator:
    """Answers requests with one diffusion model.

    Args:
        saved: with `diffusion`.
        end_ids: tokens that end a completion.
        sampling: holds for all requests.
        unmasking: the steps; see `samplers.settled`.
        batch_tokens: about so many places, prompts and what follows, in a batch.

    Attributes:
        work: done so far, in `seconds`.
        on_step: called after each step of a single request.
    """

    def __init__(
        self, saved: Saved, end_ids: Sequence[int], sampling: Sampling, unmasking: Unmasking, batch_tokens: int = 8192
    ):
        assert saved.diffusion is not None
        self.sampling, self.unmasking, self.diffusion = sampling, unmasking, saved.diffusion
        self.work, self.seconds = Work(), 0.0
        self.on_step: Callable[[Step], None] | None = None
        self.end_ids = frozenset(end_ids)
        self._saved, self._batch_tokens = saved, batch_tokens
        self._pad = pad_id(saved.tokenizer)
        self._vocabulary = saved.decoder.get_output_embeddings().weight.shape[0]
        self._denoiser = Denoiser(Decoder(saved.decoder), self.diffusion, saved.device, unmasking.guidance)

    def room(self, prompt_length: int) -> int:
        """Tokens that can follow a prompt of that length; none or fewer where it does not fit."""
        window, wanted = self._saved.window, self.sampling.max_new_tokens
        return wanted if window is None else min(wanted, window - prompt_length)

    def settings(self) -> dict[str, Any]:
        """All that decides what is generated, beside model and prompts."""
        return asdict(self.sampling) | asdict(self.unmasking)

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether the model's window holds the prompt and one token more, or the prompt alone where it has holes."""
        return self.room(len(ids) - (1 if self.fills(ids) else 0)) > 0

    def fills(self, ids: Sequence[int]) -> bool:
        """Whether a prompt has holes, which are filled, and nothing follows."""
        return bool(holes(ids, self.diffusion.mask_token_id))

    def generate(self, requests: Sequence[Request], on_done: OnDone, on_text: OnText | None = None) -> None:
        """As `TextGenerator.generate`, of prompts that fit."""
        waiting = [self._row(index, request) for index, request in enumerate(requests)]
        waiting.sort(key=lambda row: (row.fills, -len(row.draft.ids)))
        while waiting:
            batch = self._next_batch(waiting)
            waiting = waiting[len(batch) :]
            start = time.perf_counter()
            self._write(batch, on_done, on_text)
            self.seconds += time.perf_counter() - start

    def _row(self, index: int, request: Request) -> _Row:
        ids, open_in_prompt = list(request.ids), holes(request.ids, self.diffusion.mask_token_id)
        assert ids and self.fits(ids), "who asks checks that the prompt fits"
        # A part has random numbers of its own: those of a sample that nobody asks for.
        name = (request.row, request.sample + (request.part << 32))
        if open_in_prompt:
            return _Row(index, name, Draft(ids, open_in_prompt), ids[: open_in_prompt[0]], len(open_in_prompt), True)
        room = self.room(len(ids))
        limit = room if request.limit is None else min(room, request.limit)
        draft = to_continue(ids, limit, self.diffusion, self._saved.window, self._pad)
        return _Row(index, name, draft, ids, limit, False)

    def _next_batch(self, waiting: Sequence[_Row]) -> list[_Row]:
        batch: list[_Row] = []
        before = after = 0  # columns on both sides of where the rows are aligned
        for row in waiting:
            first = row.draft.open[0]
            before, after = max(before, first), max(after, len(row.draft.ids) - first)
            if batch and ((before + after) * (len(batch) + 1) > self._batch_tokens or row.fills != batch[0].fills):
                break
            batch.append(row)
        return batch

    def _write(self, batch: list[_Row], on_done: OnDone, on_text: OnText | None) -> None:
        # Of holes none is left for later because of where it is.
        block_length = None if batch[0].fills else self.unmasking.block_length
        layout = lay_out([row.draft for row in batch], self.diffusion, block_length, self._pad)
        not_here = torch.zeros_like(layout.canvas.open)
        for number, row in enumerate(batch):
            not_here[number, layout.starts[number] + torch.tensor(row.ends_excluded(), dtype=torch.int64)] = True
        excluded = torch.tensor(sorted(self.end_ids), dtype=torch.int64)
        names = [row.name for row in batch]
        draws = Draws(self.sampling, names, layout.starts, not_here.shape[1], not_here, excluded)
        shown = 0

        def after_step(canvas: Canvas, new: Tensor) -> None:
            nonlocal shown
            if self.on_step is not None and len(batch) == 1:
                text, start = canvas.text[0], time.perf_counter()
                self.on_step(Step(*(tensor[0][text].tolist() for tensor in (canvas.ids, canvas.open, new))))
                self.seconds -= time.perf_counter() - start
            for number, row in enumerate(batch):
                if row.done is None:
                    text = canvas.text[number]
                    row.done = self._finished(row, canvas.ids[number][text], canvas.open[number][text])
                    if row.done is not None:
                        canvas.open[number] = False
                        on_done(row.index, row.done)
            if on_text is not None:
                text_so_far = self._text_so_far(batch[0], canvas)
                on_text(text_so_far[shown:])
                shown = max(shown, len(text_so_far))

        write_texts(self._denoiser, layout, self.unmasking, draws, self._vocabulary, self.work, after_step)

    def _finished(self, row: _Row, ids: Tensor, is_open: Tensor) -> Completion | None:
        """The completion, where no place of it is open any more."""
        if row.fills:
            if is_open.any():
                return None
            text = self._saved.tokenizer.decode(
                ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return Completion(text, tuple(ids[list(row.draft.open)].tolist()), "filled")
        written = _closed_from(is_open, len(row.prompt), row.limit)
        if written == row.written:
            return None
        row.written = written
        new = ids[len(row.prompt) : len(row.prompt) + written].tolist()
        return self._ended(row.prompt, new, row.limit)

    def _ended(self, prompt: list[int], new: list[int], limit: int) -> Completion | None:
        """The completion that `new`, the tokens after a prompt, hold; None where they do not end."""
        end = next((place for place, token in enumerate(new) if token in self.end_ids), None)
        if end is None and len(new) < limit and not self.sampling.stop:
            return None
        text = decode_after(self._saved.tokenizer, prompt, new[:end])
        stops = [text.find(stop) for stop in self.sampling.stop if stop in text]
        if stops:
            num = next(num for num in range(1, len(new) + 1) if self._holds_stop(prompt, new[:num]))
            return Completion(text[: min(stops)], tuple(new[:num]), "stop")
        if end is not None:
            return Completion(text, tuple(new[: end + 1]), "stop")
        return Completion(text, tuple(new), "length") if len(new) == limit else None

    def _holds_stop(self, prompt: list[int], new: list[int]) -> bool:
        text = decode_after(self._saved.tokenizer, prompt, new)
        return any(stop in text for stop in self.sampling.stop)

    def _text_so_far(self, row: _Row, canvas: Canvas) -> str:
        """What will not change any more of a single row's text."""
        if row.done is not None or row.fills:
            return "" if row.done is None else row.done.text
        start = len(row.prompt)
        ids = canvas.ids[0][canvas.text[0]][start : start + row.written].tolist()
        text = decode_after(self._saved.tokenizer, row.prompt, ids)
        # A character whose bytes are not all there yet, or what may become a stop text, is held back.
        longest = max((len(stop) for stop in self.sampling.stop), default=1) - 1
        return text[: len(text) - longest].rstrip("\ufffd")


def _closed_from(is_open: Tensor, start: int, limit: int) -> int:
    """How many places from `start` on are written, at most `limit`, before the first that is not."""
    opened = is_open[start : start + limit].nonzero()
    return limit if len(opened) == 0 else int(opened[0])
