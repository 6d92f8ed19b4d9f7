"""Every predicate against loops over rows, queries and keys, and what each attention kernel is given of them."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from llmtrain.errors import InputError
from llmtrain.models.attention import (
    Visible,
    as_mask,
    bidirectional,
    block_causal,
    block_diffusion,
    both,
    causal,
    coin,
    dense,
    either,
    shared_prompts,
    within,
)
from tests import tiny

CPU = torch.device("cpu")
PADDING = -1
# Two packed documents and padding; one document and a half; a row without padding.
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 10])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2], list(range(10))])
BLOCKS = POSITIONS // 3
ROWS, LENGTH = DOCUMENTS.shape
TWICE = torch.cat([DOCUMENTS, DOCUMENTS], dim=1), torch.cat([BLOCKS, BLOCKS], dim=1)

# A prompt with two answers, another with one, padding; a prompt with three answers; groups without a prompt, padding.
SEGMENTS = torch.tensor(
    [
        [256, 256, 257, 257, 258, 512, 513, 513, 0, 0],
        [256, 256, 256, 257, 258, 258, 258, 259, 259, 259],
        [257, 257, 258, 513, 513, 0, 0, 0, 0, 0],
    ]
)

Rule = Callable[[int, int, int], bool]


def same_document(row: int, query: int, key: int) -> bool:
    return DOCUMENTS[row, query].item() == DOCUMENTS[row, key].item()


def prompt_or_same_answer(row: int, query: int, key: int) -> bool:
    (group, answer), (other_group, other) = (divmod(int(SEGMENTS[row, place]), 256) for place in (query, key))
    if not group:
        return query == key
    return key <= query and group == other_group and other in (0, answer)


def published(row: int, query: int, key: int) -> bool:
    """The mask of BD3-LM's block diffusion as its equation has it, block-diagonal | offset | block-causal."""
    n = LENGTH
    xq, xk = query >= n, key >= n
    bq, bk = BLOCKS[row, query % n].item(), BLOCKS[row, key % n].item()
    block_diagonal = bq == bk and xq == xk
    offset_block_causal = bq > bk and xk and not xq
    block_causal_part = bq >= bk and xk and xq
    return block_diagonal or offset_block_causal or block_causal_part


PREDICATES: dict[str, tuple[Visible, Rule, int]] = {
    "causal": (causal, lambda row, query, key: key <= query, LENGTH),
    "bidirectional": (bidirectional, lambda row, query, key: True, LENGTH),
    "within": (within(DOCUMENTS), same_document, LENGTH),
    "block_causal": (
        block_causal(BLOCKS),
        lambda row, query, key: BLOCKS[row, key].item() <= BLOCKS[row, query].item(),
        LENGTH,
    ),
    "block_diffusion": (block_diffusion(TWICE[1]), published, 2 * LENGTH),
    "block_diffusion, packed": (
        both(within(TWICE[0]), block_diffusion(TWICE[1])),
        lambda row, query, key: published(row, query, key) and same_document(row, query % LENGTH, key % LENGTH),
        2 * LENGTH,
    ),
    "causal, packed": (
        both(causal, within(DOCUMENTS)),
        lambda row, query, key: key <= query and same_document(row, query, key),
        LENGTH,
    ),
    "block_causal, packed, text only": (
        both(within(DOCUMENTS), block_causal(BLOCKS), within((DOCUMENTS != PADDING).long())),
        lambda row, query, key: same_document(row, query, key) and BLOCKS[row, key].item() <= BLOCKS[row, query].item(),
        LENGTH,
    ),
    "shared_prompts": (shared_prompts(SEGMENTS), prompt_or_same_answer, LENGTH),
    "either": (
        either(causal, within(DOCUMENTS), within(BLOCKS)),
        lambda row, query, key: (
            key <= query or same_document(row, query, key) or BLOCKS[row, key].item() == BLOCKS[row, query].item()
        ),
        LENGTH,
    ),
}


def by_loops(rule: Rule, length: int) -> Tensor:
    mask = torch.zeros(ROWS, length, length, dtype=torch.bool)
    for row in range(ROWS):
        for query in range(length):
            for key in range(length):
                mask[row, query, key] = rule(row, query, key)
    return mask


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates(name: str) -> None:
    predicate, rule, length = PREDICATES[name]
    mask = dense(predicate, ROWS, length, length, CPU)
    assert mask.dtype == torch.bool and mask.shape == (ROWS, 1, length, length)
    assert torch.equal(mask[:, 0], by_loops(rule, length))
    assert mask[:, 0].diagonal(dim1=1, dim2=2).all()  # or a softmax of nothing would be NaN, in padding too


@pytest.mark.parametrize("name", PREDICATES)
def test_the_last_queries_are_those_of_the_whole(name: str) -> None:
    """With a cache only the new tokens ask."""
    predicate, _, length = PREDICATES[name]
    whole = dense(predicate, ROWS, length, length, CPU)
    assert torch.equal(dense(predicate, ROWS, 4, length, CPU), whole[:, :, -4:])


@pytest.mark.parametrize("name", PREDICATES)
def test_masks_for_the_kernels(name: str) -> None:
    predicate, rule, length = PREDICATES[name]
    expected = by_loops(rule, length)
    for kernel, dtype in itertools.product(("sdpa", "eager"), (torch.float32, torch.bfloat16)):
        mask = as_mask(kernel, predicate, ROWS, length, CPU, dtype)
        assert isinstance(mask, Tensor) and mask.dtype == dtype
        assert torch.equal(mask[:, 0] == 0, expected) and mask.isfinite().all()
        assert mask[:, 0][~expected].eq(torch.finfo(dtype).min).all()


@pytest.mark.parametrize("name", PREDICATES)
def test_flex_attention_sees_what_sdpa_sees(name: str) -> None:
    predicate, _, length = PREDICATES[name]
    mask = as_mask("flex_attention", predicate, ROWS, length, CPU, torch.float32)
    assert isinstance(mask, BlockMask)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, 2, length, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        ours = torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=mask)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=dense(predicate, ROWS, length, length, CPU)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_blocks_that_nobody_sees_are_skipped() -> None:
    """What makes FlexAttention fast: of [noisy; clean] about three in four squares of 128 are empty."""
    blocks = (torch.arange(1024) // 128).repeat(2)[None]
    mask = as_mask("flex_attention", block_diffusion(blocks), 1, 2048, CPU, torch.float32)
    assert isinstance(mask, BlockMask)
    computed = 8 + 8 * 7 // 2 + 8 * 9 // 2  # own noisy block, clean blocks before it, clean blocks up to one's own
    assert int(mask.to_dense().sum()) == computed


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "paged|sdpa", None])
def test_kernels_that_take_no_mask_are_refused(kernel: str | None) -> None:
    with pytest.raises(InputError, match="knows causal attention only") as caught:
        as_mask(kernel, bidirectional, 1, 4, CPU, torch.float32)
    assert caught.value.where == "model.attention" and "sdpa" in (caught.value.remedy or "")


MASKED = ("bidirectional", "block_diffusion, packed", "block_causal, packed, text only")
KERNELS = [(architecture, name) for architecture in ("llama", "qwen3") for name in MASKED]
EVERY_DAY = {("llama", "bidirectional"), ("qwen3", "block_diffusion, packed")}  # each compiles kernels of its own


@pytest.mark.parametrize(
    ("architecture", "name"),
    [pytest.param(*case, marks=[] if case in EVERY_DAY else [pytest.mark.slow]) for case in KERNELS],
)
def test_a_model_computes_the_same_with_every_kernel(architecture: str, name: str) -> None:
    predicate, _, length = PREDICATES[name]
    ids = torch.randint(tiny.VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([POSITIONS] * (length // LENGTH), dim=1)
    hidden = {}
    for kernel in ("sdpa", "eager", "flex_attention"):
        fields = tiny.LLAMA | ({"head_dim": 8} if architecture == "qwen3" else {})
        decoder = tiny.decoder(architecture, attn_implementation=kernel, **fields).eval()
        assert decoder.hf.config._attn_implementation == kernel
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)  # so that attention is far from even
            hidden[kernel] = decoder(ids, positions, lambda states, head: states, predicate)
    torch.testing.assert_close(hidden["eager"], hidden["sdpa"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden["flex_attention"], hidden["sdpa"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_one_mask_serves_all_layers(kernel: str) -> None:
    """Of the square only one is kept for backward; SDPA makes another of a boolean mask in each layer."""
    decoder = tiny.decoder(num_hidden_layers=4, attn_implementation=kernel)
    ids, length = torch.arange(40)[None], 40
    kept = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (1, 1, length, length):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(ids, ids, lambda states, head: states, within(torch.zeros_like(ids))).sum()
    assert len(kept) <= 1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_mask_is_in_the_dtype_of_the_computation(kernel: str) -> None:
    """An additive float32 mask would make scores float32 in a bf16 model, and its minimum infinite."""
    ids, positions = torch.arange(LENGTH)[None], torch.arange(LENGTH)[None]
    decoder = tiny.decoder(dtype=torch.bfloat16, attn_implementation=kernel)
    seen = []
    decoder.layers()[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].dtype), with_kwargs=True
    )
    states = decoder(ids, positions, lambda states, head: states, within(torch.zeros_like(ids)))
    assert seen == [torch.bfloat16] and states.dtype == torch.bfloat16 and states.isfinite().all()
    decoder = tiny.decoder(attn_implementation=kernel)
    decoder.layers()[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].dtype), with_kwargs=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder(ids, positions, lambda states, head: states, within(torch.zeros_like(ids)))
    assert seen[1] == torch.bfloat16


SEEDS = torch.tensor([0, 1, 2, 5_000_000_017])


def pairs_seen(share: float, length: int = 256, seeds: Tensor = SEEDS) -> Tensor:
    return dense(coin(seeds, torch.tensor(share)), len(seeds), length, length, CPU)[:, 0]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_a_coin_shows_its_share_of_the_pairs(share: float) -> None:
    """Of all pairs, and of those of any query, of any key, of any distance: five standard errors."""
    seen = pairs_seen(share).double()
    length = seen.shape[1]
    deviation = (share * (1 - share)) ** 0.5
    assert abs(seen.mean().item() - share) < 5 * deviation / seen.numel() ** 0.5
    for dim in (1, 2):
        assert (seen.mean(dim) - share).abs().max().item() < 5 * deviation / length**0.5
    for distance in range(-100, 101):
        diagonal = seen.diagonal(distance, dim1=1, dim2=2)
        assert (diagonal.mean(1) - share).abs().max().item() < 5.5 * deviation / diagonal.shape[1] ** 0.5


def test_a_coin_of_all_or_of_none() -> None:
    assert pairs_seen(1.0).all()
    assert not pairs_seen(0.0).any()


def test_what_a_coin_showed_stays_visible() -> None:
    shares = [0.0, 0.05, 0.2, 0.21, 0.7, 0.99, 1.0]
    for less, more in itertools.pairwise(shares):
        assert (pairs_seen(less) <= pairs_seen(more)).all()


def test_coins_of_different_rows_are_independent() -> None:
    """Rows next to each other have seeds next to each other; no row's coins are another's, nor another's moved."""
    seen = pairs_seen(0.5, seeds=torch.arange(4)).double() - 0.5
    for a in range(4):
        for b in range(a):
            for moved in (-3, -2, -1, 0, 1, 2, 3):
                for dim in (0, 1):
                    correlation = (seen[a] * seen[b].roll(moved, dim)).mean().item() / 0.25
                    assert abs(correlation) < 5 / 256, (a, b, moved, dim)
