"""What a token may attend to: predicates, and what attention kernels take of them.

A predicate has the signature of FlexAttention's mask_mod: of a row, a head, a query's and a key's index
(integer tensors that broadcast) it says whether the query sees the key. So one definition serves every
kernel: a dense additive mask for SDPA and eager, a BlockMask for FlexAttention, which skips what is not visible and
never holds the square.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from llmtrain.errors import InputError

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A token sees itself and those before it."""
    return query >= key


def bidirectional(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Every token sees every token."""
    return (query >= 0) & (key >= 0)


def within(ids: Tensor) -> Visible:
    """Tokens of the same number see each other: packed documents, or text and padding.

    Args:
        ids: int [B, T], such as document ids; padding has a number of its own.
    """
    return lambda row, head, query, key: ids[row, query] == ids[row, key]


def block_causal(blocks: Tensor) -> Visible:
    """A token sees its own block, and the blocks before it.

    Args:
        blocks: int [B, T], not falling within a document.
    """
    return lambda row, head, query, key: blocks[row, query] >= blocks[row, key]


def block_diffusion(blocks: Tensor) -> Visible:
    """Of [noisy; clean] copies of a row: BD3-LM's mask (arXiv 2503.09573, section 3.3).

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees clean
    blocks up to its own.

    Args:
        blocks: int [B, 2T]: the block of each token, the same in both halves.
    """
    length = blocks.shape[1] // 2

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = blocks[row, query], blocks[row, key]
        query_clean, key_clean = query >= length, key >= length
        same_copy = (own == other) & (query_clean == key_clean)
        before = (own > other) & key_clean
        return same_copy | before

    return visible


SEGMENTS_A_GROUP = 256  # numbers that a prompt and its answers take up in `shared_prompts`


def shared_prompts(segments: Tensor) -> Visible:
    """Answers to one prompt, behind it in a row: a token sees the prompt, and its own answer up to itself.

    So each answer is computed as if it stood behind the prompt alone, where its positions go on from the
    prompt's. Padding sees itself only: a softmax over nothing would be NaN.

    Args:
        segments: int [B, T]: of group g, from 1, g * SEGMENTS_A_GROUP for the prompt and g * SEGMENTS_A_GROUP + k
            for answer k, from 1; 0 for padding.
    """

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = segments[row, query], segments[row, key]
        same_group = own // SEGMENTS_A_GROUP == other // SEGMENTS_A_GROUP
        prompt_or_own = (other % SEGMENTS_A_GROUP == 0) | (own == other)
        return (query >= key) & same_group & prompt_or_own & ((own > 0) | (query == key))

    return visible


def coin(seeds: Tensor, share: Tensor) -> Visible:
    """Each pair is visible with probability `share`, by a hash of (seed, query, key).

    Args:
        seeds: int64 [B], a row's own.
        share: float [], from 0 to 1.
    """
    limit = (share * (1 << 24)).to(torch.int64)
    # Multiplications wrap in 64 bits; the constants are those of splitmix64, as signed numbers. Seeds are mixed by
    # themselves first: next to each other, they would make a row's coins those of the row before, moved by a place.
    own = seeds * -7046029254386353131
    own = (own ^ (own >> 29)) * -4658895280553007687

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mixed = own[row] + query * -7046029254386353131 + key * -4658895280553007687
        mixed = (mixed ^ (mixed >> 29)) * -7723592293110705685
        return ((mixed >> 33) & ((1 << 24) - 1)) < limit

    return visible


def both(*predicates: Visible) -> Visible:
    """Visible to all of them."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        answer = predicates[0](row, head, query, key)
        for predicate in predicates[1:]:
            answer = answer & predicate(row, head, query, key)
        return answer

    return visible


def either(*predicates: Visible) -> Visible:
    """Visible to one of them at least."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        answer = predicates[0](row, head, query, key)
        for predicate in predicates[1:]:
            answer = answer | predicate(row, head, query, key)
        return answer

    return visible


def dense(visible: Visible, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The predicate as a bool [B, 1, Q, K]; the queries are the last ones of the keys, as with a cache."""
    row = torch.arange(rows, device=device).view(-1, 1, 1)
    query = torch.arange(keys - queries, keys, device=device).view(1, -1, 1)
    key = torch.arange(keys, device=device).view(1, 1, -1)
    return visible(row, torch.zeros_like(row), query, key).expand(rows, queries, keys).unsqueeze(1)


def as_mask(
    kernel: str | None,
    visible: Visible,
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    cached: int = 0,
) -> Tensor | BlockMask:
    """What a transformers model with this attention kernel takes as attention_mask for [B, T] tokens.

    Args:
        kernel: transformers' attn_implementation.
        dtype: that attention is computed in, for an additive mask.
        cached: tokens before these whose keys a cache holds; the predicate counts them.

    Raises:
        InputError: the kernel takes no mask of this kind.
    """
    if kernel == "flex_attention":
        # Compiled, so that the square of predicates is never in memory; a CPU has no such kernel for training.
        def moved(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(row, head, query + cached, key)

        predicate = moved if cached else visible
        create = create_block_mask if device.type == "cpu" else _compiled_create()
        return create(predicate, rows, None, length, cached + length, device=str(device))
    if kernel not in ("sdpa", "eager"):
        raise InputError(
            f"attention {kernel} knows causal attention only",
            where="model.attention",
            remedy="use sdpa, or on GPUs flex_attention, which skips what is not visible",
        )
    mask = dense(visible, rows, length, cached + length, device)
    # For SDPA, too, which would make one of a boolean mask in every layer, and keep each for backward.
    additive = torch.zeros(mask.shape, dtype=dtype, device=device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)


@cache
def _compiled_create() -> Callable[..., BlockMask]:
    create: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return create
