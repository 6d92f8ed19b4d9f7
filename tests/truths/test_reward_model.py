"""Bradley-Terry and K-wise reward losses against their formulas, on scores of transformers' own forward."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from llmtrain.algorithms import reward_model
from llmtrain.algorithms.answers import answer_scores
from llmtrain.contracts import POLICY
from llmtrain.recipe.schema import RewardModel
from tests.answers import (
    LAYOUTS,
    Group,
    Layout,
    assert_same,
    drawn_group,
    laid_out,
    loss_and_gradients,
    scorer,
    slow_scores,
    without_weight,
)

PLAIN = RewardModel(kind="reward_model")
RANKED = drawn_group(6, [5, 3, 7, 4], [1, 2, 3, 4])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_scores_are_those_of_transformers_for_each_answer_alone(layout: Layout) -> None:
    """Whatever stands behind it: padding on the right, or other answers."""
    groups = [RANKED, drawn_group(3, [1, 9], [1, 2], seed=1)]
    model = scorer()
    scores = answer_scores(model, laid_out(groups, layout))
    torch.testing.assert_close(scores, torch.stack(slow_scores(model, groups)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 0.5)])
def test_two_answers_are_bradley_terry(margin: float, centering: float) -> None:
    pairs = [drawn_group(4, [5, 3], [1, 2], seed, margin) for seed in range(3)]
    model = scorer()
    better, worse = torch.stack(slow_scores(model, pairs)).view(3, 2).unbind(1)
    by_formula = -F.logsigmoid(better - worse - margin) + centering * (better + worse) ** 2
    loss = reward_model.loss(RewardModel(kind="reward_model", centering=centering))
    output = loss(model, laid_out(pairs))
    torch.testing.assert_close(output.sums[POLICY], by_formula.sum())
    metrics = {name: value / weight for name, (value, weight) in output.metrics.items()}
    torch.testing.assert_close(metrics["accuracy"], (better > worse).float().mean())
    torch.testing.assert_close(metrics["margin"], (better - worse).mean().detach())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_k_answers_in_one_forward_equal_all_pairs_one_by_one(layout: Layout) -> None:
    model = scorer()
    loss = reward_model.loss(RewardModel(kind="reward_model", centering=0.01))
    pairs = [
        Group(RANKED.prompt, [RANKED.answers[i], RANKED.answers[j]], [1, 2])
        for i, j in itertools.combinations(range(4), 2)
    ]
    total, gradients = loss_and_gradients(model, loss(model, laid_out(pairs, "padded")))
    one_by_one = total / 6, {name: gradient / 6 for name, gradient in gradients.items()}
    assert_same(loss_and_gradients(model, loss(model, laid_out([RANKED], layout))), one_by_one)


def test_answers_of_one_rank_are_not_compared() -> None:
    model = scorer()
    loss = reward_model.loss(PLAIN)
    first, second, third, _ = RANKED.answers
    tied = Group(RANKED.prompt, [first, second, third], [1, 1, 2])
    pairs = [Group(RANKED.prompt, [first, third], [1, 2]), Group(RANKED.prompt, [second, third], [1, 2])]
    expected = loss(model, laid_out(pairs)).sums[POLICY] / 2
    torch.testing.assert_close(loss(model, laid_out([tied])).sums[POLICY], expected)


def test_the_order_of_the_answers_does_not_matter() -> None:
    model = scorer()
    loss = reward_model.loss(PLAIN)
    turned = Group(RANKED.prompt, RANKED.answers[::-1], RANKED.levels[::-1])
    expected = loss(model, laid_out([RANKED])).sums[POLICY]
    torch.testing.assert_close(loss(model, laid_out([turned])).sums[POLICY], expected)


def test_equal_scores_are_half_right_and_cost_log_2() -> None:
    """Of a head of zeros; every group counts 1, however many answers it has."""
    model = scorer()
    torch.nn.init.zeros_(model.hf.score.weight)
    micro = laid_out([RANKED, drawn_group(3, [2, 2], [1, 2], seed=1)])
    output = reward_model.loss(PLAIN)(model, micro)
    torch.testing.assert_close(output.sums[POLICY], 2 * torch.tensor(2.0).log())
    metrics = {name: float(value) / weight for name, (value, weight) in output.metrics.items()}
    assert metrics == pytest.approx({"accuracy": 0.5, "margin": 0})


def test_what_fills_up_a_rank_adds_nothing() -> None:
    model = scorer()
    output = reward_model.loss(PLAIN)(model, without_weight(laid_out([RANKED], "shared")))
    total, gradients = loss_and_gradients(model, output)
    assert total == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
