"""Masked diffusion's training against LLaDA's equations, computed plainly; and what all diffusion shares."""

import math
from typing import Any

import pytest
import torch

from llmtrain.algorithms.building import Process
from llmtrain.algorithms.masked_diffusion import MaskedDiffusion
from llmtrain.algorithms.masking import rows_of
from llmtrain.contracts import POLICY, MicroBatch
from tests import tiny
from tests.noise import (
    LENGTH,
    MASK,
    MODELS,
    PROCESSES,
    ROWS,
    assert_same_training,
    block,
    decoder,
    documents,
    masked,
    masked_in,
    masked_loss,
    micro_of,
    score_entropy,
)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_packed_documents_train_as_each_alone(architecture: str, attention: str, shift: bool) -> None:
    """Equation 3 of LLaDA document by document, with whole logits; in loss and in all gradients."""
    model, process, before = decoder(architecture, attention), masked(shift=shift), micro_of(ROWS, LENGTH)
    noised = process.noised(1, before)
    ours = process.loss(model, noised).sums[POLICY]
    theirs = masked_loss(model, before, masked_in(before, noised, shift=shift), shift=shift)
    assert_same_training(model, ours, theirs)
    held_out = process.held_out(before, 3)
    ours = process.loss(model, held_out).sums[POLICY]
    theirs = masked_loss(model, before, masked_in(before, held_out, shift=shift), shift=shift)
    torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_padding_changes_nothing(name: str) -> None:
    """Rows padded to a common length, cut to the longest of them, or each alone: in loss and in all gradients."""
    model, process = decoder(), PROCESSES[name]()
    rows = [[document] for document in documents([9, 14, 5], prompt=1)]
    together = process.loss(model, process.noised(2, micro_of(rows, LENGTH, first=6))).sums[POLICY]
    longest = process.loss(model, process.noised(2, micro_of(rows, 14, first=6))).sums[POLICY]
    assert_same_training(model, longest, together)
    alone = [
        process.loss(model, process.noised(2, micro_of([row], len(row[0].ids), first=6 + number))).sums[POLICY]
        for number, row in enumerate(rows)
    ]
    assert_same_training(model, sum(alone, torch.zeros(())), together)


def test_the_weight_is_all_trained_tokens() -> None:
    """And not the masked ones, which would be no bound of the likelihood; with shift the first have no row before."""
    before = micro_of([documents([9, 8], prompt=3)], LENGTH)
    trained = (9 - 4) + (8 - 4)
    for process in (masked(), block(), score_entropy("absorbing"), score_entropy("uniform")):
        assert process.noised(0, before).weights == {POLICY: trained} == process.held_out(before, 1).weights
    rows = rows_of(before, MASK, shift=False)
    assert rows.input_ids[rows.trained].tolist() == [
        token for document in documents([9, 8], prompt=3) for token in document.ids[4:]
    ]
    for process in (masked(shift=True), block(shift=True)):
        assert process.noised(0, before).weights == {POLICY: trained}
    # A row that goes on with a document: its first token is one to predict, and has a row before it in no row.
    before.tensors["trained"][0, 0] = True
    assert masked().noised(0, before).weights == {POLICY: trained + 1}
    assert masked(shift=True).noised(0, before).weights == {POLICY: trained}
    assert block(shift=True).noised(0, before).weights == {POLICY: trained}


@pytest.mark.parametrize("process", [masked(), masked(complementary=True), block(), score_entropy("absorbing")])
def test_what_is_not_trained_stays_clean(process: Process) -> None:
    """Prompts, and the token that begins a document."""
    for step in range(20):
        before = micro_of([documents([9, 8], prompt=3), documents([20], prompt=10)], LENGTH, first=3 * step)
        clean = ~before.tensors["trained"]
        noisy = process.noised(step, before).tensors["input_ids"]
        for view in noisy[:, :LENGTH].split(2):
            assert torch.equal(view[clean], before.tensors["input_ids"][clean])


@pytest.mark.parametrize("process", [masked(1), block(1), score_entropy("absorbing", 1)])
def test_data_that_hold_the_mask_token(process: Process) -> None:
    """What is masked is what was drawn, and never what looks like it; the mask itself is nothing to predict."""
    document = documents([20])[0]
    for place in (0, 5, 6, 19):
        document.ids[place] = MASK
    counted = 20 - 4
    seen = 0
    for step in range(20):
        before = micro_of([[document]], LENGTH, first=step)
        noised = process.noised(step, before)
        assert noised.weights == {POLICY: counted}
        assert MASK not in noised.tensors["targets"].tolist()
        places = noised.tensors["heads"].tolist()
        assert not {0, 5, 6, 19} & set(places) and len(places) == len(set(places))
        seen += len(places)
    assert 0.2 < seen / (20 * counted) < 0.8
    if isinstance(process, MaskedDiffusion):
        model = decoder()
        noised = process.noised(3, before)
        theirs = masked_loss(model, before, masked_in(before, noised, shift=False))
        torch.testing.assert_close(process.loss(model, noised).sums[POLICY], theirs, rtol=4e-6, atol=0)


@pytest.mark.parametrize("name", ["masked", "complementary", "block", "absorbing", "uniform"])
def test_normalised_by_sequences(name: str) -> None:
    """LLaDA's fine-tuning: the mean over documents of (sum of a document / its trained tokens)."""
    settings: dict[str, Any] = {"normalization": "sequences"}
    build: dict[str, Any] = {
        "masked": masked,
        "complementary": lambda **given: masked(complementary=True, **given),
        "block": block,
        "absorbing": lambda **given: score_entropy("absorbing", **given),
        "uniform": lambda **given: score_entropy("uniform", **given),
    }
    model, before = decoder(), micro_of([documents([9, 6], prompt=2), documents([20], prompt=12)], LENGTH)
    # A document's own sum: the loss when only this document is trained.
    total = torch.zeros(())
    for row, column in ((0, 0), (0, 9), (1, 0)):
        one = micro_of([documents([9, 6], prompt=2), documents([20], prompt=12)], LENGTH)
        is_own = one.tensors["document_ids"] == one.tensors["document_ids"][row, column]
        is_own[1 - row] = False
        one.tensors["trained"][~is_own] = False
        plain = build[name]().noised(4, before)  # the noise is that of all
        heads = plain.tensors["heads"]
        width = plain.tensors["input_ids"].shape[1]
        own = is_own[(heads // width) % 2, (heads % width) % LENGTH]
        tensors = dict(plain.tensors) | {"row_weights": plain.tensors["row_weights"] * own}
        alone = build[name]().loss(model, MicroBatch(tensors, plain.weights, 0)).sums[POLICY]
        total = total + alone / one.tensors["trained"].sum()
    process = build[name](**settings)
    noised = process.noised(4, before)
    assert noised.weights == {POLICY: 3.0}
    assert_same_training(model, process.loss(model, noised).sums[POLICY], total)
    # What is reported is always the bound per token.
    assert process.held_out(before, 2).weights == {POLICY: float(before.tensors["trained"].sum())}
    for key, tensor in build[name]().held_out(before, 2).tensors.items():
        assert torch.equal(process.held_out(before, 2).tensors[key], tensor), key


def test_a_uniform_predictor_has_the_loss_of_one() -> None:
    """With exactly l of L masked there is no variance: log of all tokens but the mask, for each trained token."""
    model = decoder()
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
    for process in (masked(), block(block_size=5), block(block_size=1)):
        for first in range(0, 60, 3):
            held_out = process.held_out(micro_of(ROWS, LENGTH, first), 60)
            loss = process.loss(model, held_out).sums[POLICY].item() / held_out.weights[POLICY]
            assert loss == pytest.approx(math.log(tiny.VOCABULARY - 1), rel=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_annealing_begins_causal_and_ends_bidirectional(shift: bool) -> None:
    model, before = decoder(), micro_of(ROWS, LENGTH)
    slowly, plain = masked(shift=shift, annealing_steps=10**9), masked(shift=shift)
    noised = slowly.noised(0, before)
    masks = masked_in(before, noised, shift=shift)
    causal = masked_loss(model, before, masks, shift=shift, visible=lambda query, key: query >= key)
    assert_same_training(model, slowly.loss(model, noised).sums[POLICY], causal)

    annealed = masked(shift=shift, annealing_steps=10)
    bidirectional = masked_loss(model, before, masks, shift=shift)
    assert abs(bidirectional.item() - causal.item()) > 1e-2 * causal.item()
    losses = []
    for ratio in (0.3, 1.0):
        tensors = dict(noised.tensors) | {"ratio": torch.tensor(ratio)}
        losses.append(annealed.loss(model, MicroBatch(tensors, noised.weights, 0)).sums[POLICY].item())
    assert losses[1] == pytest.approx(bidirectional.item(), rel=4e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4) != causal.item()
    ratios = [annealed.noised(step, before).tensors["ratio"].item() for step in range(9)]
    assert ratios == pytest.approx([number / 10 for number in range(1, 10)])
    assert all("ratio" not in annealed.noised(step, before).tensors for step in (9, 10, 1000))
    for step in (9, 50):  # from its end on, and for held-out rows always, nothing tells it from plain attention
        end = annealed.noised(step, before)
        same = plain.loss(model, plain.noised(step, before)).sums[POLICY]
        torch.testing.assert_close(annealed.loss(model, end).sums[POLICY], same, rtol=1e-6, atol=0)
    held_out = annealed.loss(model, annealed.held_out(before, 3)).sums[POLICY]
    torch.testing.assert_close(held_out, plain.loss(model, plain.held_out(before, 3)).sums[POLICY], rtol=1e-6, atol=0)
