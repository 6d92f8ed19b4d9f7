"""What a diffusion model predicts at the open places of texts, with keys and values that are computed once.

Attention is bidirectional over a text, or, for block diffusion, over its block and those before it. The mask has no
probability. A prefix is the first columns of a canvas, whose keys and values are kept: exact for block diffusion,
where finished blocks do not see what is written after them; for bidirectional models what Fast-dLLM (arXiv
2505.22618) does, an approximation, since the prefix no longer hears of what is written behind it.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmtrain.models.attention import Visible, block_causal, both, within
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.loss_head import bias_without, logits_in_chunks
from llmtrain.sampling.canvas import Canvas

OfLogits = Callable[[Tensor, slice], tuple[Tensor, ...]]


class Prefix:
    """Keys and values, in every layer, of the first `length` columns of a canvas."""

    def __init__(self, cache: DynamicCache | None = None, length: int = 0):
        self.cache, self.length = DynamicCache() if cache is None else cache, length

    def cut(self, length: int) -> None:
        """Leaves the first `length` columns of what the cache holds."""
        self.cache.crop(length - self.cache.get_seq_length())
        self.length = length

    def of_rows(self, rows: Tensor, num_rows: int) -> "Prefix":
        """A copy of some of its `num_rows` rows; each may be there more than once, one copy after the other."""
        if self.length == 0:
            return Prefix()
        held: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in self.cache.layers]
        copies = len(held[0][0]) // num_rows
        index = torch.cat([rows + copy * num_rows for copy in range(copies)]).to(held[0][0].device)
        return Prefix(DynamicCache([(keys[index], values[index]) for keys, values in held]), self.length)


class Denoiser:
    """A model with `Decoder.forward`, asked for the tokens of open places.

    Args:
        model: in evaluation mode; an engine's module serves, but takes no prefix.
        diffusion: how the model attends, and which row predicts a place.
        device: the model's.
        guidance: w of classifier-free guidance, un + (w + 1) (cond - un), where `un` has all given tokens masked
            (LLaDA); 0 is off, and otherwise each forward has twice the rows.
    """

    def __init__(self, model: nn.Module, diffusion: Diffusion, device: torch.device, guidance: float = 0.0):
        assert guidance == 0 or diffusion.mask_token_id is not None, "nothing could hide the given tokens"
        self.diffusion, self.guidance = diffusion, guidance
        self._model, self._device = model, device

    @torch.no_grad()
    def predict(
        self, canvas: Canvas, places: Tensor, of_logits: OfLogits, prefix: Prefix | None = None, keep: int | None = None
    ) -> tuple[Tensor, ...]:
        """What `of_logits` makes of the logits at `places`.

        Args:
            places: int64 [N], in the flattened [B, L] of the canvas. With `shift` the first token of a text has no
                row before it, and cannot be asked for.
            of_logits: called with float32 logits [n, V] and which of the places they are of, chunk by chunk; gives
                tensors [n, ...].
            prefix: columns that are not computed again; the places lie behind them.
            keep: columns that the prefix holds afterwards; default: as many as before.

        Returns:
            The chunks of each tensor in one, [N, ...].
        """
        diffusion, (rows, width) = self.diffusion, canvas.ids.shape
        start = 0 if prefix is None else prefix.length
        place = places // width, places % width - (1 if diffusion.shift else 0)
        heads = (place[0] * (width - start) + place[1] - start).to(self._device)
        seen = self._guided(canvas) if self.guidance else canvas
        ids, positions = (tensor[:, start:].to(self._device) for tensor in (seen.ids, seen.positions))

        def head_function(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, ...]:
            flat = hidden.flatten(0, 1)
            mask = diffusion.mask_token_id
            bias = head.bias if mask is None else bias_without(head, mask)
            chunks: Iterable[tuple[Tensor, slice]] = logits_in_chunks(flat[heads], head.weight, bias)
            if self.guidance:
                unguided = logits_in_chunks(flat[heads + rows * (width - start)], head.weight, bias)
                chunks = self._guidance(chunks, unguided)
            parts = [of_logits(logits, part) for logits, part in chunks]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

        visible = self._visible(seen)
        if prefix is None:
            found: tuple[Tensor, ...] = self._model(ids, positions, head_function, visible)
            return found
        found = self._model(ids, positions, head_function, visible, prefix.cache)
        prefix.cut(start if keep is None else max(start, keep))
        return found

    def logits(self, canvas: Canvas, places: Tensor, prefix: Prefix | None = None) -> Tensor:
        """float32 [N, V]; arguments as for `predict`."""
        (found,) = self.predict(canvas, places, lambda logits, _: (logits,), prefix)
        return found

    def _visible(self, canvas: Canvas) -> Visible:
        same_text = within(canvas.text.to(self._device))
        if self.diffusion.block_size is None:
            return same_text
        return both(same_text, block_causal((canvas.positions // self.diffusion.block_size).to(self._device)))

    def _guided(self, canvas: Canvas) -> Canvas:
        """The rows, and then once more with all given tokens masked."""
        assert self.diffusion.mask_token_id is not None
        hidden = canvas.ids.masked_fill(canvas.given, self.diffusion.mask_token_id)
        others = (torch.cat([tensor, tensor]) for tensor in (canvas.text, canvas.open, canvas.given))
        return Canvas(torch.cat([canvas.ids, hidden]), *others)

    def _guidance(
        self, guided: Iterable[tuple[Tensor, slice]], unguided: Iterable[tuple[Tensor, slice]]
    ) -> Iterator[tuple[Tensor, slice]]:
        for (cond, part), (un, _) in zip(guided, unguided, strict=True):
            yield un + (self.guidance + 1) * (cond - un), part
