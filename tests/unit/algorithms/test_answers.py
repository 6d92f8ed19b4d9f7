"""What losses read of answers: in which precision, and what of micro-batches that only fill up a rank."""

from contextlib import nullcontext
from typing import cast

import pytest
import torch

from llmtrain.algorithms import answers
from llmtrain.contracts import POLICY
from tests import tiny
from tests.answers import LAYOUTS, Layout, drawn_group, laid_out, scorer, without_weight

GROUPS = [drawn_group(4, [5, 3, 1], [2, 1, 3]), drawn_group(2, [2, 6], [1, 2], seed=1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_are_of_trained_tokens(layout: Layout) -> None:
    assert answers.answer_lengths(laid_out(GROUPS, layout)).tolist() == [5, 3, 1, 2, 6]


def test_prompts_are_shared_where_the_batch_says_so() -> None:
    assert answers.visible(laid_out(GROUPS, "shared")) is not None
    assert answers.visible(laid_out(GROUPS, "separate")) is None


def test_pairs_are_ordered_by_rank_and_weigh_1_a_group() -> None:
    micro = laid_out(GROUPS)
    better, worse = answers.of_pairs(torch.arange(5.0), micro)
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {(1, 0), (1, 2), (0, 2), (3, 4)}
    torch.testing.assert_close(answers.pair_sum(torch.ones(4), micro), torch.tensor(2.0))
    means = answers.pair_means(micro, ahead=better)
    assert means["ahead"].weight == 2
    torch.testing.assert_close(means["ahead"].value, torch.tensor(2 / 3 + 3))


def test_a_tie_is_half_right() -> None:
    assert answers.right(torch.tensor([3.0, 0.0, -0.1])).tolist() == [1, 0.5, 0]


def test_metrics_carry_no_gradient() -> None:
    values = torch.ones(4, requires_grad=True)
    metric = answers.pair_means(laid_out(GROUPS), values=values)["values"]
    assert not cast(torch.Tensor, metric.value).requires_grad


@torch.no_grad()
def test_scores_are_multiplied_in_float32_where_all_else_is_bfloat16() -> None:
    """bfloat16 has 8 bits: scores of 100 would be whole numbers."""
    model = scorer()
    model.hf.score.weight.mul_(1000)
    with torch.autocast("cpu", torch.bfloat16):
        scores = answers.answer_scores(model, laid_out(GROUPS))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_a_bias_of_the_head_counts() -> None:
    head = torch.nn.Linear(3, 2)
    rows = torch.randn(4, 3)
    torch.testing.assert_close(answers.float32_logits(rows, head), head(rows))


@torch.no_grad()
def test_a_batch_that_fills_up_has_no_answers() -> None:
    micro = without_weight(laid_out(GROUPS, "shared"))
    assert answers.answer_logprobs(tiny.decoder(), micro).shape == (0,)
    assert answers.answer_scores(scorer(), micro).shape == (0,)
    assert micro.weights == {POLICY: 0.0}


def test_the_cached_reference_is_what_the_batch_holds() -> None:
    micro = laid_out(GROUPS, references=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert answers.cached_reference(tiny.decoder(), micro).tolist() == [1, 2, 3, 4, 5]


def test_a_reference_with_the_adapter_off_is_without_dropout() -> None:
    model, micro = tiny.decoder(attention_dropout=0.5), laid_out(GROUPS)
    plain = answers.answer_logprobs(model.eval(), micro)
    model.train()
    torch.testing.assert_close(answers.reference_without(nullcontext)(model, micro), plain)
    assert model.training
