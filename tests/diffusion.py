"""Diffusion models for the tests: tiny ones on a disk, and one whose conditionals are exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.attention import Visible, dense
from llmtrain.models.diffusion import Diffusion, save_diffusion
from tests import tiny
from tests.saved import CHAT_TEMPLATE, write_model

MASK = 95  # of the tiny models: the word w95, which no other word begins with
MASKED = Diffusion("masked", MASK, shift=False)
BLOCK = Diffusion("block", MASK, shift=False, block_size=4)
UNIFORM = Diffusion("uniform", None, shift=False)
MASKED_SHIFTED, BLOCK_SHIFTED, UNIFORM_SHIFTED = (replace(kind, shift=True) for kind in (MASKED, BLOCK, UNIFORM))


def write_diffusion_model(directory: Path, diffusion: Diffusion, **fields: Any) -> Path:
    """A tiny Llama of random weights that says it is this diffusion model."""
    write_model(directory, **fields)
    if diffusion.mask_token_id is not None:
        tokenizer = tiny.tokenizer()
        tokenizer.add_special_tokens({"mask_token": f"w{diffusion.mask_token_id}"})
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(directory)
    save_diffusion(diffusion, directory)
    return directory


class Exact(nn.Module):
    """A `Decoder` of a known distribution: of what a place sees it gives the place's exact probabilities.

    Args:
        table: [V, ..., V], the probability of each text; the mask is token V.
        shift: row i tells of place i + 1.
    """

    def __init__(self, table: Tensor, *, shift: bool = False):
        super().__init__()
        vocabulary, length = table.shape[0], table.dim()
        self._texts = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        self._probabilities = table.flatten().double()
        self._mask, self._shift = vocabulary, shift
        self._head = nn.Linear(vocabulary + 1, vocabulary + 1, bias=False)
        nn.init.eye_(self._head.weight)

    def forward(
        self, ids: Tensor, positions: Tensor, head: Callable[[Tensor, nn.Module], Any], visible: Visible
    ) -> Any:
        length = ids.shape[1]
        seen = dense(visible, len(ids), length, length, ids.device).flatten(1)
        distinct, which = torch.cat([ids, seen.long()], 1).unique(dim=0, return_inverse=True)
        tokens, texts = distinct[:, :length], self._texts[:, :length]
        known = distinct[:, length:].view(-1, length, length).bool() & (tokens != self._mask)[:, None]
        same = (tokens[:, None] == texts)[:, None]  # [U, 1, S, L]
        weights = (same | ~known[:, :, None]).all(-1) * self._probabilities  # [U, L, S]
        is_token = nn.functional.one_hot(texts, self._mask + 1).double()  # [S, L, V + 1]
        joint = torch.einsum("uls,slv->ulv", weights, is_token)
        logits = (joint / joint.sum(-1, keepdim=True)).log().clamp_min(-1e4).float()
        return head((logits.roll(-1, 1) if self._shift else logits)[which], self._head)
