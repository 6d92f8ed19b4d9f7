"""Truths about an architecture, checked on a few tokens before any training.

transformers has about two hundred decoders; some scale or cap their logits after the head, some
carry state past a document's end, some are encoders that see the token they predict. Training one of
those as if it were none would be silently wrong, so each model is asked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.distributed import lost_ranks_told
from llmtrain.errors import InputError
from llmtrain.models.attention import Visible, within
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.recipe.schema import Recipe

# Twice what float32 rounding does to hidden states of order one in a deep model; a real difference
# (a softcap, a leak) is larger by orders of magnitude. bf16 rounds at 2^-8.
TOLERANCE, TOLERANCE_BF16 = 1e-3, 1e-1


@dataclass(frozen=True)
class Asked:
    """A model to ask, in evaluation mode.

    Attributes:
        model: as the engine wrapped it; its forward is the decoder's.
        decoder: gives names and sizes.
        device: what the model computes on.
        exact: computes in float32.
    """

    model: nn.Module
    decoder: Decoder
    device: torch.device
    exact: bool

    @property
    def kind(self) -> str:
        return type(self.decoder.hf).__name__

    @property
    def vocabulary(self) -> int:
        return int(self.decoder.hf.config.vocab_size)

    def hidden(self, ids: Tensor, positions: Tensor | None = None, visible: Visible | None = None) -> Tensor:
        """Hidden states [1, T, D] in float32."""
        states: Tensor = self.model(ids.to(self.device), positions, lambda hidden, head: hidden, visible)
        return states.float()

    def differ(self, a: Tensor, b: Tensor) -> bool:
        relative = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        return relative > (TOLERANCE if self.exact else TOLERANCE_BF16)


@torch.no_grad()
def check_head(asked: Asked) -> None:
    """Raises InputError where the model's logits are not simply its head on its hidden states, or it cannot run.

    Where transformers classifies a row as a whole, that is asked of its last token.
    """
    ids = torch.arange(8, device=asked.device).unsqueeze(0) % asked.vocabulary
    if ids[0, -1] == config_field(asked.decoder.hf.config.get_text_config(), "pad_token_id"):
        ids = ids.flip(1)  # it would take the token before
    try:
        with lost_ranks_told():  # a rank that died is no fault of the model's
            theirs = asked.model(ids, None, None).float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # sizes that transformers does not check against each other
        raise InputError(
            f"{asked.kind} of this config cannot run: {error}",
            where="model",
            remedy="make its sizes fit each other: num_key_value_heads, for one, must divide num_attention_heads, and "
            "its default may not",
        ) from error
    ours = asked.model(ids, None, lambda hidden, head: head(hidden)).float()
    if asked.differ(ours[:, -theirs.shape[1] :], theirs):
        raise InputError(
            f"{asked.kind} changes its logits after the head (scaling or soft-capping), "
            "which the chunked loss does not do"
            if asked.decoder.scoring_head is None
            else f"{asked.kind} does not score by its head on the last layer alone",
            where="model",
            remedy="choose an architecture without it, such as llama, qwen3, mistral or olmo2",
        )


@torch.no_grad()
def check_causality(asked: Asked) -> None:
    """Raises InputError where hidden states change with a token after their own."""
    ids = torch.arange(8).unsqueeze(0) % asked.vocabulary
    other = ids.clone()
    other[:, -1] = (other[:, -1] + asked.vocabulary // 2) % asked.vocabulary
    if asked.differ(asked.hidden(ids)[:, :-1], asked.hidden(other)[:, :-1]):
        raise InputError(
            f"{asked.kind} sees the tokens that it is to predict: its attention is not causal",
            where="model",
            remedy="choose a decoder; for an encoder such as bert set model.config.is_decoder: true",
        )


@torch.no_grad()
def check_attends_as_told(asked: Asked) -> None:
    """Raises InputError where hidden states are not functions of just the tokens that a predicate makes visible.

    Asked with two documents of a row, bidirectional in each: a token has to change with the last one of its
    own document, and must not change with the other document.
    """
    ids = torch.arange(8).unsqueeze(0) % asked.vocabulary
    other = ids.clone()
    other[:, 3] = (other[:, 3] + asked.vocabulary // 2) % asked.vocabulary
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], device=asked.device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=asked.device)
    remedy = (
        "diffusion and shared prompts (algorithm.share_prompts) need attention that takes a mask; choose a decoder "
        "such as llama, qwen3 or olmo2, or share no prompts"
    )
    try:
        with lost_ranks_told():
            before, after = (asked.hidden(tokens, positions, within(document)) for tokens in (ids, other))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # of code that counts on a mask of another shape
        raise InputError(
            f"{asked.kind} takes no mask that says who attends to whom: {type(error).__name__}: {error}",
            where="model",
            remedy=remedy,
        ) from error
    seen = all(bool((before[:, place] != after[:, place]).any()) for place in range(4))
    if not seen or asked.differ(before[:, 4:], after[:, 4:]):
        what = "sees another document" if seen else "does not see those after it"
        raise InputError(
            f"{asked.kind} does not attend as it is told: a token {what}",
            where="model",
            remedy=remedy,
        )


@torch.no_grad()
def check_document_isolation(asked: Asked, num_rows: int) -> None:
    """Raises InputError where a packed document changes with the document before it.

    Args:
        num_rows: of a micro-batch. transformers hands restarts of positions to FlashAttention for a single row only.
    """
    first = torch.arange(6).unsqueeze(0) % asked.vocabulary
    other = (first + asked.vocabulary // 2) % asked.vocabulary
    second = torch.arange(7, 12).unsqueeze(0) % asked.vocabulary
    positions = torch.cat([torch.arange(6), torch.arange(5)]).unsqueeze(0).to(asked.device)

    def tail(document: Tensor, rows: int) -> Tensor:
        ids = torch.cat([document, second], dim=1)
        return asked.hidden(ids.expand(rows, -1), positions.expand(rows, -1))[:, 6:]

    for rows in range(1, min(2, num_rows) + 1):
        if asked.differ(tail(first, rows), tail(other, rows)):
            single = rows == 1
            raise InputError(
                f"{asked.kind} carries state from one packed document into the next"
                + ("" if single else " where a micro-batch has several rows"),
                where="data.packing",
                remedy="set data.packing: none, so that each row holds one document"
                + ("" if single else "; or model.attention: auto, or batch.micro_sequences: 1"),
            )


def check_shares_prompts(decoder: Decoder, recipe: Recipe) -> None:
    """Raises InputError where answers cannot share a prompt.

    The model tells positions by where tokens stand, so that answers would be behind each other; or it has a window
    that a mask would overrule.
    """
    if not decoder.tells_positions:
        raise InputError(
            f"{type(decoder.hf).__name__} tells positions by where tokens stand in the row, and not by position ids: "
            "an answer that stands behind others would be further from its prompt than it is",
            where="algorithm.share_prompts",
            remedy="set it to false",
        )
    config = decoder.hf.config.to_dict()
    windows = [config.get(name) for name in ("sliding_window", "attention_chunk_size")]
    narrow = [window for window in windows if isinstance(window, int) and 0 < window < recipe.sequence_length]
    if narrow and config.get("use_sliding_window", True):
        raise InputError(
            f"{type(decoder.hf).__name__} attends to {narrow[0]} tokens, and rows have {recipe.sequence_length}: the "
            "mask of shared prompts would let it see more than it does when it is used",
            where="algorithm.share_prompts",
            remedy=f"set it to false, or sequence_length to {narrow[0]} or less",
        )
