"""What goes into a decoder beside the tokens: learnt vectors before every document, noise on the embeddings."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class WithPrompt(NamedTuple):
    """Packed rows in which virtual tokens stand before every document.

    Attributes:
        embeddings: [B, T', D].
        positions: [B, T'], from 0 in every document, virtual tokens counted.
        places: [B, T]: where in T' each token of the row is.
    """

    embeddings: Tensor
    positions: Tensor
    places: Tensor


class VirtualTokens(nn.Module):
    """Learnt embeddings before every document (prompt tuning, arXiv 2104.08691; p-tuning, arXiv 2103.10385).

    Args:
        encoder: gives [1, num, D] of the indices [1, num].
        num: virtual tokens of a document.
    """

    def __init__(self, encoder: nn.Module, num: int):
        super().__init__()
        self.encoder, self.num = encoder, num

    def forward(self, embeddings: Tensor, position_ids: Tensor | None) -> WithPrompt:
        """Puts them into rows of embeddings [B, T, D]; positions as `Decoder.forward` takes them."""
        rows, _, width = embeddings.shape
        prompt = self.encoder(torch.arange(self.num, device=embeddings.device).unsqueeze(0))
        layout = prompt_layout(_begins(embeddings, position_ids), self.num)
        with_prompt = torch.cat([embeddings, prompt.to(embeddings.dtype).expand(rows, -1, -1)], dim=1)
        index = layout.sources.unsqueeze(-1).expand(-1, -1, width)
        return WithPrompt(with_prompt.gather(1, index), layout.positions, layout.places)


class Prefix(nn.Module):
    """Learnt keys and values before the row in every layer (prefix tuning, arXiv 2101.00190).

    Args:
        encoder: gives [1, num, layers * 2 * heads * head_dim] of the indices [1, num].
        num: length of the prefix.
        heads: key and value heads of a layer.
        layers: of the decoder.
    """

    def __init__(self, encoder: nn.Module, num: int, layers: int, heads: int):
        super().__init__()
        self.encoder, self.num, self._layers, self._heads = encoder, num, layers, heads

    def forward(self, rows: int, dtype: torch.dtype) -> DynamicCache:
        """A cache that begins with the prefix, for `rows` rows."""
        device = next(self.encoder.parameters()).device
        states = self.encoder(torch.arange(self.num, device=device).unsqueeze(0)).to(dtype)
        # [2 * layers, rows, heads, num, head_dim]
        states = states.view(1, self.num, self._layers * 2, self._heads, -1).permute(2, 0, 3, 1, 4)
        states = states.expand(-1, rows, -1, -1, -1)
        return DynamicCache([(states[2 * layer], states[2 * layer + 1]) for layer in range(self._layers)])


class Layout(NamedTuple):
    """How T tokens and `num` virtual ones become T' = T + num * (most documents in a row).

    Attributes:
        sources: [B, T']: index in the row of what stands there; T and more are virtual tokens.
        positions: [B, T'], from 0 in every document. Rows of fewer documents end in one more, that nobody reads.
        places: [B, T]: where each token went.
    """

    sources: Tensor
    positions: Tensor
    places: Tensor


def prompt_layout(begins: Tensor, num: int) -> Layout:
    """Where `num` virtual tokens go before every document.

    Args:
        begins: bool [B, T], true at a document's first token.
    """
    rows, length = begins.shape
    documents = begins.cumsum(1)
    own = torch.arange(length, device=begins.device).expand(rows, -1)
    places = own + num * documents
    width = length + num * int(documents[:, -1].max())  # waits for the device: the width is needed here
    index = torch.arange(width, device=begins.device).expand(rows, -1)
    is_token = torch.zeros((rows, width), dtype=torch.bool, device=begins.device).scatter(1, places, True)
    last_token = index.where(is_token, -1).cummax(1).values
    behind = index - last_token - 1  # of what is no token: how far it is from the token before
    sources = (length + behind.clamp_max(num - 1)).scatter(1, places, own)
    starts = index.where(~is_token & (behind == 0), 0).cummax(1).values
    return Layout(sources, index - starts, places)


def neftune_noise(embeddings: Tensor, position_ids: Tensor | None, alpha: float) -> Tensor:
    """Uniform noise in +- alpha / sqrt(L * D) on embeddings [B, T, D], L the length of a token's document.

    NEFTune, arXiv 2310.05914. Drawn from the device's global generator, whose state is in checkpoints.
    """
    begins = _begins(embeddings, position_ids)
    rows, length = begins.shape
    # Documents numbered through the batch, so that one count serves all rows.
    document = begins.flatten().cumsum(0) - 1
    lengths = torch.bincount(document, minlength=1)[document].view(rows, length, 1)
    bound = alpha / (lengths * embeddings.shape[-1]).sqrt()
    return (torch.empty_like(embeddings).uniform_(-1, 1) * bound).to(embeddings.dtype)


def _begins(embeddings: Tensor, position_ids: Tensor | None) -> Tensor:
    """bool [B, T]: where documents begin, which is wherever positions do not rise by one."""
    rows, length, _ = embeddings.shape
    begins = torch.ones((rows, length), dtype=torch.bool, device=embeddings.device)
    begins[:, 1:] = False if position_ids is None else position_ids.diff(dim=1) != 1
    return begins
