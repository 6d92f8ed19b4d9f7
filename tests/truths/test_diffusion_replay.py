"""The likelihood of a text under a deterministic policy: exact, by replaying the choices of the sampler."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.evaluation.likelihood import (
    Order,
    of_decoder,
    replay,
)
from llmtrain.evaluation.scoring import Span, rows_of_spans
from llmtrain.models.diffusion import Diffusion
from llmtrain.sampling.canvas import Canvas, Draft, lay_out
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.samplers import Unmasking
from llmtrain.sampling.writing import Work, write
from tests import tiny
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASKED, MASKED_SHIFTED
from tests.tables import (
    ALL,
    FORMS,
    MASK,
    TEXTS,
    V,
    any_answers,
    by_table,
    conditionals,
    form,
    logp_after,
    nats,
    of_model,
    of_real,
    rows_of,
    some_distribution,
)

ORDERS = [
    Order(),
    Order(tokens_per_step=2),
    Order(steps=2),
    Order(steps=3, block_length=2),
    Order(threshold=0.5),
    Order(threshold=0.4, block_length=3),
    Order(by="place"),
    Order(by="place", tokens_per_step=3),
    Order(by="place", steps=2, block_length=3),
]


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_replay_sums_to_one(order: Order) -> None:
    predict = of_model(by_table(any_answers()), MASK)
    total = np.exp(-replay(predict, rows_of(TEXTS), None, order)).sum()
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [None, 1, 2, 3])
@pytest.mark.parametrize("order", [Order(), Order(tokens_per_step=2), Order(threshold=0.5), Order(steps=2)], ids=repr)
def test_replay_of_real_decoders_sums_to_one(block_size: int | None, shift: bool, order: Order) -> None:
    total = np.exp(-replay(of_real(block_size, shift), rows_of(ALL, 1), block_size, order)).sum()
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("block_size", "shift"), FORMS)
def test_replay_of_exact_conditionals_is_the_likelihood(block_size: int | None, shift: bool) -> None:
    p = some_distribution()
    predict, first = form(conditionals(p), block_size, shift)
    orders = [Order(by="place")] if (block_size, shift) == (2, True) else [Order(by="place"), Order()]
    for order in orders:
        found = replay(predict, rows_of(TEXTS, first), block_size, order)
        np.testing.assert_allclose(found, -logp_after(p, first), atol=1e-4)


def test_replay_goes_the_way_of_the_sampler() -> None:
    """Equal confidence everywhere: the earliest places first, so that two of them see nothing of each other."""
    table = torch.zeros_like(any_answers())
    p = some_distribution()
    table[:, 2:] = conditionals(p)[:, 2:]
    table[:, 2:] = torch.where(table[:, 2:] == 0, -torch.inf, table[:, 2:])
    table[:, :2] = 0.0
    predict, text = of_model(by_table(table), MASK), TEXTS[50]
    by_hand = 2 * math.log(V) + nats(table, text, [0, 1], 2) + nats(table, text, [0, 1, 2], 3)
    assert float(replay(predict, rows_of([text]), None, Order(by="place"))[0]) == pytest.approx(by_hand)
    two = 2 * math.log(V) + nats(table, text, [0, 1], 2) + nats(table, text, [0, 1], 3)
    order = Order(by="place", tokens_per_step=2)
    assert float(replay(predict, rows_of([text]), None, order)[0]) == pytest.approx(two)


@pytest.mark.parametrize(
    ("unmasking", "order"),
    [
        (Unmasking(block_length=3), Order(block_length=3)),
        (Unmasking(steps=4), Order(steps=4)),
        (Unmasking(steps=5, block_length=4), Order(steps=5, block_length=4)),
        (Unmasking("threshold", block_length=8, threshold=0.5), Order(threshold=0.5, block_length=8)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Order) else "",
)
@pytest.mark.parametrize("diffusion", [MASKED, MASKED_SHIFTED, BLOCK, BLOCK_SHIFTED], ids=repr)
def test_replay_of_what_a_sampler_wrote(unmasking: Unmasking, order: Order, diffusion: Diffusion) -> None:
    """Prompts of unequal length, side by side; the probability of each text is what its tokens were drawn with."""
    decoder = tiny.decoder(max_position_embeddings=64).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 96, (length,), generator=random).tolist() for length in (2, 5, 9)]
    drafts = [Draft(prompt + [4] * 10, range(len(prompt), len(prompt) + 10)) for prompt in prompts]
    layout = lay_out(drafts, diffusion, unmasking.block_length, 2)
    drawn, total = torch.zeros(layout.canvas.ids.numel()), torch.zeros(3)

    def choose(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        tokens = logits.softmax(1).multinomial(1, generator=random)
        drawn[places] = logits.log_softmax(1).gather(1, tokens).squeeze(1)
        return logits, tokens.squeeze(1)

    def after_step(canvas: Canvas, chosen: Tensor) -> None:
        total.add_(torch.where(chosen, drawn.view(chosen.shape), 0.0).sum(1))

    denoiser = Denoiser(decoder, diffusion, torch.device("cpu"))
    write(denoiser, layout, unmasking, torch.zeros(layout.canvas.ids.shape), choose, Work(), after_step)
    canvas = layout.canvas
    texts = [canvas.ids[row][canvas.text[row]].numpy() for row in range(3)]
    spans = [Span(text, np.arange(len(text)) >= len(prompt), 0) for text, prompt in zip(texts, prompts, strict=True)]
    if diffusion.block_size is not None:
        order = replace(order, block_length=None)
    found = replay(of_decoder(decoder, diffusion), rows_of_spans(spans), diffusion.block_size, order)
    np.testing.assert_allclose(found, -total.numpy(), rtol=1e-4)
