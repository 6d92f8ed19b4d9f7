"""Three truths about an architecture, checked on a few tokens before any training.

transformers has about two hundred decoders; some scale or cap their logits after the head, some
carry state past a document's end, some are encoders that see the token they predict. Training one of
those as if it were none would be silently wrong, so each model is asked.
"""

import torch
from torch import Tensor

from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder

# Twice what float32 rounding does to hidden states of order one in a deep model; a real difference
# (a softcap, a leak) is larger by orders of magnitude. bf16 weights round at 2^-8.
TOLERANCE, TOLERANCE_BF16 = 1e-3, 1e-1


def _tolerance(decoder: Decoder) -> float:
    rounded = decoder.hf.dtype == torch.bfloat16 or torch.is_autocast_enabled(decoder.hf.device.type)
    return TOLERANCE_BF16 if rounded else TOLERANCE


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


@torch.no_grad()
def check_head(decoder: Decoder) -> None:
    """Raises InputError where the model's logits are not simply its head on its hidden states, or it cannot run."""
    decoder.eval()
    ids = torch.arange(8).unsqueeze(0).to(decoder.hf.device) % decoder.hf.config.vocab_size

    try:
        theirs = decoder.hf(input_ids=ids, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # sizes that transformers does not check against each other
        raise InputError(
            f"{type(decoder.hf).__name__} of this config cannot run: {error}",
            where="model",
            remedy="make its sizes fit each other: num_key_value_heads, for one, must divide num_attention_heads, and "
            "its default may not",
        ) from error
    ours = decoder(ids, None, lambda hidden, head: head(hidden)).float()
    if _relative_difference(ours, theirs) > _tolerance(decoder):
        raise InputError(
            f"{type(decoder.hf).__name__} changes its logits after the head (scaling or soft-capping), "
            "which the chunked loss does not do",
            where="model",
            remedy="choose an architecture without it, such as llama, qwen3, mistral or olmo2",
        )


@torch.no_grad()
def check_causality(decoder: Decoder) -> None:
    """Raises InputError where hidden states change with a token after their own."""
    decoder.eval()
    vocabulary = decoder.hf.config.vocab_size
    ids = torch.arange(8).unsqueeze(0) % vocabulary
    other = ids.clone()
    other[:, -1] = (other[:, -1] + vocabulary // 2) % vocabulary

    def before_the_last(row: Tensor) -> Tensor:
        hidden: Tensor = decoder(row.to(decoder.hf.device), None, lambda hidden, head: hidden)
        return hidden[:, :-1].float()

    if _relative_difference(before_the_last(ids), before_the_last(other)) > _tolerance(decoder):
        raise InputError(
            f"{type(decoder.hf).__name__} sees the tokens that it is to predict: its attention is not causal",
            where="model",
            remedy="choose a decoder; for an encoder such as bert set model.config.is_decoder: true",
        )


@torch.no_grad()
def check_document_isolation(decoder: Decoder) -> None:
    """Raises InputError where a packed document changes with the document before it."""
    decoder.eval()
    vocabulary = decoder.hf.config.vocab_size
    first = torch.arange(6).unsqueeze(0) % vocabulary
    other = (first + vocabulary // 2) % vocabulary
    second = torch.arange(7, 12).unsqueeze(0) % vocabulary
    positions = torch.cat([torch.arange(6), torch.arange(5)]).unsqueeze(0).to(decoder.hf.device)

    def tail(document: Tensor) -> Tensor:
        ids = torch.cat([document, second], dim=1).to(decoder.hf.device)
        hidden: Tensor = decoder(ids, positions, lambda hidden, head: hidden)
        return hidden[:, 6:].float()

    if _relative_difference(tail(first), tail(other)) > _tolerance(decoder):
        raise InputError(
            f"{type(decoder.hf).__name__} carries state from one packed document into the next",
            where="data.packing",
            remedy="set data.packing: none, so that each row holds one document",
        )
