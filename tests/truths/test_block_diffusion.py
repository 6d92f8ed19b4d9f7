"""Block diffusion in one forward of [noisy; clean], against BD3-LM's equations computed a block at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.algorithms.clipped_rates import LEAST_BLOCKS, candidates, least_variance
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.models.attention import block_diffusion, both, within
from llmtrain.models.decoder import Decoder
from tests.noise import (
    LENGTH,
    MASK,
    MODELS,
    PACKED,
    ROWS,
    Document,
    Masked,
    assert_same_training,
    block,
    block_loss,
    decoder,
    documents,
    everything,
    log_probabilities,
    masked,
    masked_in,
    masked_loss,
    micro_of,
    spans_of,
)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, LENGTH])
@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_one_forward_equals_a_loop_over_blocks(architecture: str, attention: str, size: int, shift: bool) -> None:
    """Truths 9 and 10: packed documents, cut into blocks from their starts; loss and all gradients."""
    model, process = decoder(architecture, attention), block(block_size=size, shift=shift)
    before = micro_of(ROWS, LENGTH)
    noised = process.noised(1, before)
    ours = process.loss(model, noised).sums[POLICY]
    theirs = block_loss(model, before, masked_in(before, noised, shift=shift), size, shift=shift)
    assert_same_training(model, ours, theirs)
    held_out = process.held_out(before, 3)
    theirs = block_loss(model, before, masked_in(before, held_out, shift=shift), size, shift=shift)
    torch.testing.assert_close(process.loss(model, held_out).sums[POLICY], theirs, rtol=4e-6, atol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_packed_documents_train_as_each_in_a_row_of_its_own(shift: bool) -> None:
    """Truth 10 once more, both sides in the forward of 2T; the noise is given, as it differs with the place."""
    model, process = decoder(), block(block_size=4, shift=shift)
    before = micro_of(ROWS, LENGTH)
    noised = process.noised(1, before)
    masks = masked_in(before, noised, shift=shift)
    total = torch.zeros(())
    for row, spans in enumerate(spans_of(before)):
        for number, span in enumerate(spans):
            one = micro_of([[ROWS[row][number]]], len(span))
            own = {place - span.start: what for place, what in masks[row].items() if place in span}
            total = total + process.loss(model, given_noise(one, own, 4, shift=shift)).sums[POLICY]
    assert_same_training(model, process.loss(model, noised).sums[POLICY], total)


def given_noise(before: MicroBatch, masks: dict[int, Masked], size: int, *, shift: bool) -> MicroBatch:
    """One row of [noisy; clean], made by hand."""
    ids = before.tensors["input_ids"]
    length, places = ids.shape[1], sorted(masks)
    noisy = ids.clone()
    noisy[0, places] = MASK
    before_it = [place - 1 + (length if place % size == 0 else 0) for place in places]
    tensors = {
        "input_ids": torch.cat([noisy, ids], dim=1),
        "targets": ids[0, places],
        "heads": torch.tensor(before_it if shift else places, dtype=torch.int64),
        "row_weights": torch.tensor([masks[place].weight for place in places]),
        "positions": before.tensors["positions"],
        "position_ids": before.tensors["position_ids"].repeat(1, 2),
        "document_ids": before.tensors["document_ids"].repeat(1, 2),
        "blocks": before.tensors["position_ids"].repeat(1, 2) // size,
    }
    return MicroBatch(tensors, {POLICY: 1.0}, length)


# Blocks of one token


@pytest.mark.parametrize("shift", [False, True])
def test_with_blocks_of_one_token_the_bound_is_the_likelihood(shift: bool) -> None:
    """Truth 6: -log p of each token given all tokens before it, whatever the step; shifted it is autoregression."""
    model, process = decoder(), block(block_size=1, shift=shift, clip=[0.3, 0.8])
    for step in (0, 5):
        before = micro_of(ROWS, LENGTH, first=3 * step)
        nll = torch.zeros(())
        for document in PACKED:
            for place in range(1, len(document.ids)):
                seen = document.ids[:place] if shift else [*document.ids[:place], MASK]
                logp = log_probabilities(model, seen, range(len(seen)), lambda query, key: query >= key)
                nll = nll - logp[-1, document.ids[place]]
        noised = process.noised(step, before)
        assert noised.weights == {POLICY: sum(len(document.ids) - 1 for document in PACKED)}
        assert_same_training(model, process.loss(model, noised).sums[POLICY], nll)
        torch.testing.assert_close(
            process.loss(model, process.held_out(before, 99)).sums[POLICY], nll, rtol=4e-6, atol=0
        )


@pytest.mark.parametrize("shift", [False, True])
def test_with_blocks_of_one_token_probabilities_sum_to_one(shift: bool) -> None:
    """Over all texts of three tokens, of which each is any but the mask."""
    model, process = decoder(vocab_size=MASK + 1), block(125, block_size=1, shift=shift)
    few = [3, 4, 5, 6, 7]
    with torch.no_grad():
        # Only these five have a probability, so that all texts can be counted.
        keep = torch.zeros(MASK + 1, dtype=torch.bool)
        keep[few] = True
        model.hf.lm_head.bias = torch.nn.Parameter(torch.where(keep, 0.0, -1e9))
        total = 0.0
        for text in itertools.product(few, repeat=3):
            one = micro_of([[Document([0, *text], [False, True, True, True])]], 4)
            total += math.exp(-process.loss(model, process.noised(0, one)).sums[POLICY].item())
    assert total == pytest.approx(1, abs=1e-5)


def test_with_blocks_of_one_token_other_masks_do_not_matter() -> None:
    """So that all may be masked at once, and the rate is of no importance."""
    model = decoder()
    document = documents([8])[0]
    everywhere = halves(model, document, [False, *[True] * 7], 1)
    for place in range(1, 8):
        alone = halves(model, document, [own == place for own in range(8)], 1)
        torch.testing.assert_close(alone[0, place], everywhere[0, place], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def halves(
    model: Decoder, document: Document, is_masked: list[bool], size: int, clean: list[int] | None = None
) -> Tensor:
    """Hidden states [2, T, D] of the noisy and the clean copy of one document."""
    noisy = [MASK if gone else token for token, gone in zip(document.ids, is_masked, strict=True)]
    length = len(noisy)
    ids = torch.tensor([noisy + (document.ids if clean is None else clean)])
    positions = torch.arange(length).repeat(2)[None]
    visible = both(within(torch.zeros_like(ids)), block_diffusion(positions // size))
    hidden: Tensor = model(ids, positions, lambda states, head: states, visible)
    return hidden.view(2, length, -1)


# One block


@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_with_one_block_the_noisy_half_is_the_bidirectional_forward(architecture: str, attention: str) -> None:
    """Truth 7."""
    model, document = decoder(architecture, attention), documents([13])[0]
    is_masked = [place % 3 == 1 for place in range(13)]
    noisy = [MASK if gone else token for token, gone in zip(document.ids, is_masked, strict=True)]
    with torch.no_grad():
        excluded = model(
            torch.tensor([noisy]), torch.arange(13)[None], lambda states, head: head(states), lambda *at: at[2] == at[2]
        )[0]
        theirs = log_probabilities(model, noisy, range(13), everything)
        ours = model.hf.lm_head(halves(model, document, is_masked, 13)[0])
    torch.testing.assert_close(ours, excluded, rtol=1e-5, atol=1e-5)
    excluded[:, MASK] = -torch.inf
    torch.testing.assert_close(excluded.log_softmax(1), theirs, rtol=1e-5, atol=1e-5)


def test_with_one_block_the_loss_is_that_of_masked_diffusion() -> None:
    """Truth 7, on the same masks. (Shifted, a row's first token has the clean half to be predicted from.)"""
    model, process = decoder(), block(block_size=LENGTH)
    before = micro_of(ROWS, LENGTH)
    noised = process.noised(2, before)
    masks = masked_in(before, noised, shift=False)
    ours = process.loss(model, noised).sums[POLICY]
    assert_same_training(model, ours, masked_loss(model, before, masks))
    # And by masked diffusion's own loss: the same micro-batch, without the clean half.
    heads = noised.tensors["heads"]
    tensors = {name: noised.tensors[name] for name in ("targets", "row_weights", "positions")} | {
        "input_ids": noised.tensors["input_ids"][:, :LENGTH],
        "position_ids": noised.tensors["position_ids"][:, :LENGTH],
        "document_ids": noised.tensors["document_ids"][:, :LENGTH],
        "heads": heads // (2 * LENGTH) * LENGTH + heads % (2 * LENGTH),
    }
    theirs = masked().loss(model, MicroBatch(tensors, noised.weights, 0)).sums[POLICY]
    assert_same_training(model, ours, theirs)


# No leak


@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_what_depends_on_what(architecture: str, attention: str) -> None:
    """Truth 8: each token changed once. A noisy block changes with itself and clean blocks before it, and so on."""
    model, document, size = decoder(architecture, attention), documents([11])[0], 3
    is_masked = [place % 2 == 1 for place in range(11)]
    blocks = np.arange(11) // size
    before = halves(model, document, is_masked, size)
    for changed in range(11):
        ids = [token ^ 1 if place == changed else token for place, token in enumerate(document.ids)]
        in_clean = (halves(model, document, is_masked, size, clean=ids) - before).abs().amax(2).numpy() > 0
        assert (in_clean[0] == (blocks > blocks[changed])).all()
        assert (in_clean[1] == (blocks >= blocks[changed])).all()
        flipped = [gone != (place == changed) for place, gone in enumerate(is_masked)]
        in_noisy = (halves(model, document, flipped, size) - before).abs().amax(2).numpy() > 0
        assert (in_noisy[0] == (blocks == blocks[changed])).all()
        assert not in_noisy[1].any()


def test_the_loss_of_a_block_depends_on_no_later_token() -> None:
    """As the likelihood of its block has to: later tokens are changed, and its terms stay."""
    model, num_seen = decoder(), 0
    for shift, first in itertools.product((False, True), range(6)):
        process = block(block_size=4, shift=shift)
        document = documents([14])[0]
        before = micro_of([[document]], 14, first)
        other = micro_of([[Document([*document.ids[:8], *range(40, 46)], document.trained)]], 14, first)
        a, b = (process.noised(0, micro) for micro in (before, other))
        own = torch.tensor([place < 8 for place in sorted(masked_in(before, a, shift=shift)[0])])
        if own.all() or not own.any():
            continue
        nats = [process.nats_of_tokens(model, micro) for micro in (a, b)]
        torch.testing.assert_close(nats[0][own], nats[1][own], rtol=1e-5, atol=1e-5)
        assert (nats[0][~own] - nats[1][~own]).abs().max() > 1e-3
        num_seen += 1
    assert num_seen > 5


# Rates and sizes that change


def test_the_block_size_follows_its_curriculum() -> None:
    stages = [
        {"from_step": 0, "block_size": 1},
        {"from_step": 4, "block_size": 3},
        {"from_step": 6, "block_size": 5},
    ]
    process = block(curriculum=stages, block_size=5)
    before = micro_of(ROWS, LENGTH)
    for step, size in ((0, 1), (3, 1), (4, 3), (5, 3), (6, 5), (1000, 5)):
        noised, plain = process.noised(step, before), block(block_size=size).noised(step, before)
        assert noised.tensors.keys() == plain.tensors.keys()
        for name, tensor in noised.tensors.items():
            assert torch.equal(tensor, plain.tensors[name]), name
        assert torch.equal(noised.tensors["blocks"], torch.cat([before.tensors["position_ids"] // size] * 2, dim=1))
    # What is reported is that of the model that is to come out.
    held_out = process.held_out(before, 3)
    assert torch.equal(held_out.tensors["blocks"], torch.cat([before.tensors["position_ids"] // 5] * 2, dim=1))


def test_held_out_figures_are_of_the_bound_whatever_the_clip() -> None:
    before = micro_of(ROWS, LENGTH)
    clipped, plain = block(clip=[0.3, 0.8]).held_out(before, 3), block().held_out(before, 3)
    assert all(torch.equal(clipped.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_losses_of_blocks_at_random_rates() -> None:
    """What the search for a clip is made of: for each block its rate, its size and which masked tokens are its own."""
    process, size = block(3, length=40, block_size=5), 5
    rows = [documents([17, 20], seed=3, prompt=6), documents([38], seed=4), documents([2], seed=5)]
    before = micro_of(rows, 40)
    seen = set()
    for draw in range(6):
        noised, blocks = process.at_random_rates(before, 3, draw)
        masks = masked_in(before, noised, shift=False)
        expected = []
        for row, spans in enumerate(spans_of(before)):
            for span in spans:
                for start in range(span.start, span.stop, size):
                    places = range(start, min(start + size, span.stop))
                    trained = [place for place in places if before.tensors["trained"][row, place]]
                    if trained:
                        expected.append((len(trained), [masks[row][place] for place in trained if place in masks[row]]))
        assert blocks.sizes.tolist() == [num for num, _ in expected]
        own = np.bincount(blocks.of_masked, minlength=len(expected))
        assert own.tolist() == [len(tokens) for _, tokens in expected]
        for rate, (_, tokens) in zip(blocks.rates, expected, strict=True):
            assert 1e-3 <= rate <= 1
            assert all(token.weight == pytest.approx(1 / rate, rel=1e-6) for token in tokens)
        assert np.all(np.diff(blocks.of_masked) >= 0)
        seen.add(tuple(blocks.rates))
    assert len(seen) == 6


def test_the_range_of_least_variance() -> None:
    """Against the variance of each candidate, computed plainly."""
    chooser = np.random.default_rng(0)
    rates = chooser.random(4000)
    losses = 3 + chooser.normal(size=4000) * (0.2 + np.abs(rates - 0.55))
    found = least_variance(rates, losses)

    def variance(low: float, high: float) -> float:
        inside = losses[(low <= rates) & (rates <= high)]
        return float(inside.var())

    assert found == min(candidates(), key=lambda limits: variance(*limits))
    assert found == (0.3, 0.8)
    # Too few blocks to tell: all rates.
    few = np.linspace(0.9, 1.0, LEAST_BLOCKS - 1)
    assert least_variance(few, np.ones(len(few))) == (0.0, 1.0)


def test_candidate_ranges_are_those_of_the_paper() -> None:
    """Widths of 0.5 to 0.9 and the full range; the published choices are among them."""
    ranges = candidates()
    assert ranges[0] == (0.0, 1.0) and len(ranges) == len(set(ranges)) == 1 + 11 + 9 + 7 + 5 + 3
    assert all(0 <= low < high <= 1 for low, high in ranges)
    assert {(0.45, 0.95), (0.3, 0.8), (0.0, 0.5)} <= set(ranges)


def test_what_fills_a_last_block_is_predicted_and_not_counted() -> None:
    """Runs of the end-of-text token, but for their first: also where a row begins with what fills a text before it."""
    end = 1
    first = Document([0, 5, 6, end, end, end], [False, *[True] * 5])
    rest = Document([end, end, 0, 7, end], [True, True, True, True, True])
    micro = micro_of([[first], [rest]], 6)
    process = block(length=6, block_size=1, eos_id=end)
    for batch in (process.noised(0, micro), process.held_out(micro, 2)):
        assert len(batch.tensors["targets"]) == 5 + 5  # all that is trained is predicted
        assert batch.weights[POLICY] == 3 + 3
    examples = block(length=6, block_size=1, eos_id=end, task="sft")
    assert examples.noised(0, micro).weights[POLICY] == 5 + 5
