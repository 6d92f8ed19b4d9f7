"""Texts with open places, laid side by side for a diffusion model.

Rows are padded on the left so that what is to be written begins in the same column: blocks of all rows are then the
same columns, and what lies before them can be kept as one prefix. The model sees no padding, and positions count
from the text's own beginning, so that a row's text does not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.models.diffusion import Diffusion


@dataclass(frozen=True)
class Draft:
    """A text of which some places are open.

    Attributes:
        ids: of the tokens; what stands at an open place does not matter.
        open: the places to write, rising, not empty.
    """

    ids: Sequence[int]
    open: Sequence[int]


@dataclass
class Canvas:
    """Texts as they are being written, a row each; tensors on the CPU.

    Attributes:
        ids: int64 [B, L].
        text: bool [B, L]; the rest is padding.
        open: bool [B, L]: places that hold no token yet.
        given: bool [B, L]: places whose token was there from the beginning.
    """

    ids: Tensor
    text: Tensor
    open: Tensor
    given: Tensor

    @property
    def positions(self) -> Tensor:
        """int64 [B, L], from 0 in each text."""
        return (self.text.cumsum(1) - 1).clamp_min(0)

    def part(self, rows: Tensor, end: int) -> "Canvas":
        """A copy of some rows, up to a column."""
        return Canvas(*(tensor[rows, :end] for tensor in (self.ids, self.text, self.open, self.given)))


@dataclass(frozen=True)
class Layout:
    """A canvas, and where on it the drafts are.

    Attributes:
        starts: int64 [B], the column of each text's first token.
        stages: ranges of columns [start, end) that are written one after the other; together they hold all places.
    """

    canvas: Canvas
    starts: Tensor
    stages: tuple[tuple[int, int], ...]


def to_continue(ids: Sequence[int], num: int, diffusion: Diffusion, window: int | None, filler: int) -> Draft:
    """A text with `num` open places after it; of a model with blocks to the end of the last, for it knows whole ones.

    Args:
        window: tokens that a text has at most; None for any number.
        filler: id of open places.
    """
    length, size = len(ids) + num, diffusion.block_size
    if size is not None:
        length = -(-length // size) * size
        length = length if window is None else min(length, window)
    places = range(len(ids), length)
    return Draft([*ids, *[filler] * len(places)], places)


def lay_out(drafts: Sequence[Draft], diffusion: Diffusion, block_length: int | None, filler: int) -> Layout:
    """The drafts on one canvas.

    Args:
        block_length: columns of a stage, counted from the first open place; None for one stage. Of a model with
            blocks the stages are its blocks, whatever it says.
        filler: id of padding, and of open places where the model has no mask.
    """
    size = diffusion.block_size
    firsts = [draft.open[0] if size is None else draft.open[0] // size * size for draft in drafts]
    anchor = max(firsts)
    starts = [anchor - first for first in firsts]
    width = max(start + len(draft.ids) for start, draft in zip(starts, drafts, strict=True))
    mask = filler if diffusion.mask_token_id is None else diffusion.mask_token_id
    ids = torch.full((len(drafts), width), filler)
    text, opened = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, draft) in enumerate(zip(starts, drafts, strict=True)):
        ids[row, start : start + len(draft.ids)] = torch.tensor(list(draft.ids))
        text[row, start : start + len(draft.ids)] = True
        opened[row, start + torch.tensor(list(draft.open))] = True
    ids[opened] = mask
    step = size or block_length or width
    stages = tuple((column, min(column + step, width)) for column in range(anchor, width, step))
    return Layout(Canvas(ids, text, opened, text & ~opened), torch.tensor(starts), stages)
