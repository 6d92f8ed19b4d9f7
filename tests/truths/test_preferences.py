"""DPO and its kin against their formulas, on the whole logits of each answer in a row of its own."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.algorithms import dpo, kto, orpo, reward_model, simpo
from llmtrain.algorithms.answers import answer_logprobs, cached_reference
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY
from llmtrain.recipe.schema import DPO, KTO, ORPO, RewardModel, SimPO
from tests import tiny
from tests.answers import (
    Group,
    assert_same,
    drawn_group,
    laid_out,
    loss_and_gradients,
    scorer,
    slow_logprobs,
    without_weight,
)

GROUPS = [
    drawn_group(4, [5, 3], [1, 2], seed=0),
    drawn_group(2, [1, 8, 4], [1, 2, 3], seed=1),
    drawn_group(7, [3, 3, 2, 6], [2, 1, 3, 1], seed=2),
]
LABELLED = [drawn_group(3 + seed, [2 + seed], [float(seed % 2)], seed) for seed in range(5)]
REFERENCES = [-20.0 - 1.5 * number for number in range(9)]
KL = 0.3


def losses() -> dict[str, Loss]:
    return {
        "dpo": dpo.loss(DPO(kind="dpo"), cached_reference),
        "smoothed": dpo.loss(DPO(kind="dpo", label_smoothing=0.1, length_normalized=True), cached_reference),
        "ipo": dpo.loss(DPO(kind="dpo", loss="ipo"), cached_reference),
        "hinge": dpo.loss(DPO(kind="dpo", loss="hinge"), cached_reference),
        "orpo": orpo.loss(ORPO(kind="orpo")),
        "simpo": simpo.loss(SimPO(kind="simpo")),
        "kto": kto.loss(KTO(kind="kto", desirable_weight=1.5), cached_reference),
        "reward_model": reward_model.loss(RewardModel(kind="reward_model", centering=0.1)),
    }


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(logprob: float) -> float:
    return logprob - math.log(1 - math.exp(logprob))


def per_pair(groups: list[Group], function: Callable[[int, int], float]) -> float:
    """The sum over groups of the mean over their pairs of a function of (better, worse), as numbers of answers."""
    total, first = 0.0, 0
    for group in groups:
        num = len(group.answers)
        values = [
            function(first + i, first + j) for i in range(num) for j in range(num) if group.levels[i] < group.levels[j]
        ]
        total += sum(values) / len(values)
        first += num
    return total


def sums_and_means(groups: list[Group]) -> tuple[list[float], list[float]]:
    tokens = slow_logprobs(tiny.decoder(), groups)
    return [of.sum().item() for of in tokens], [of.mean().item() for of in tokens]


@torch.no_grad()
def test_log_probabilities_and_lengths_of_answers() -> None:
    logprobs = answer_logprobs(tiny.decoder(), laid_out(GROUPS))
    torch.testing.assert_close(logprobs, torch.tensor(sums_and_means(GROUPS)[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, lambda delta: -log_sigmoid(0.1 * delta)),
        ({"beta": 0.5}, lambda delta: -log_sigmoid(0.5 * delta)),
        ({"label_smoothing": 0.2}, lambda delta: -0.8 * log_sigmoid(0.1 * delta) - 0.2 * log_sigmoid(-0.1 * delta)),
        ({"loss": "ipo"}, lambda delta: (delta - 5.0) ** 2),
        ({"loss": "hinge"}, lambda delta: max(0.0, 1 - 0.1 * delta)),
        ({"length_normalized": True}, lambda delta: -log_sigmoid(0.1 * delta)),
        ({"loss": "ipo", "length_normalized": True}, lambda delta: (delta - 5.0) ** 2),
    ],
)
@torch.no_grad()
def test_dpo_and_its_kin(settings: dict[str, Any], formula: Callable[[float], float]) -> None:
    sums, _ = sums_and_means(GROUPS)
    ratios = [logprob - reference for logprob, reference in zip(sums, REFERENCES, strict=True)]
    if settings.get("length_normalized"):
        lengths = [len(answer) for group in GROUPS for answer in group.answers]
        ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
    beta = settings.get("beta", 0.1)
    output = dpo.loss(DPO(kind="dpo", **settings), cached_reference)(
        tiny.decoder(), laid_out(GROUPS, references=REFERENCES)
    )
    expected = per_pair(GROUPS, lambda better, worse: formula(ratios[better] - ratios[worse]))
    assert output.sums[POLICY].item() == pytest.approx(expected, rel=1e-5)
    metrics = {name: float(value) for name, (value, _) in output.metrics.items()}
    assert metrics == pytest.approx(
        {
            "accuracy": per_pair(GROUPS, lambda better, worse: float(ratios[better] > ratios[worse])),
            "margin": per_pair(GROUPS, lambda better, worse: beta * (ratios[better] - ratios[worse])),
            "reward_better": per_pair(GROUPS, lambda better, _: beta * ratios[better]),
            "reward_worse": per_pair(GROUPS, lambda _, worse: beta * ratios[worse]),
            "logprob_better": per_pair(GROUPS, lambda better, _: sums[better]),
            "logprob_worse": per_pair(GROUPS, lambda _, worse: sums[worse]),
        },
        rel=1e-5,
    )
    assert {weight for _, weight in output.metrics.values()} == {3.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, math.log(2)), ({"label_smoothing": 0.2}, math.log(2)), ({"loss": "ipo"}, 25.0), ({"loss": "hinge"}, 1.0)],
)
def test_where_the_policy_is_the_reference_there_is_no_margin(settings: dict[str, Any], expected: float) -> None:
    """And what is left is pushed apart: the gradient of DPO is then that of -beta / 2 times the difference."""
    model = tiny.decoder()
    references = answer_logprobs(model, laid_out(GROUPS)).tolist()
    output = dpo.loss(DPO(kind="dpo", **settings), cached_reference)(model, laid_out(GROUPS, references=references))
    assert output.sums[POLICY].item() == pytest.approx(3 * expected)
    assert output.metrics["margin"].value == 0
    accuracy = output.metrics["accuracy"]  # of three groups, in each of which nothing can be told
    torch.testing.assert_close(accuracy.value, torch.tensor(1.5))
    _, gradients = loss_and_gradients(model, output)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0


def test_smoothing_mixes_both_directions() -> None:
    """Each pair as it is labelled with 1 - e, and turned round with e."""
    turned = [group._replace(levels=[-level for level in group.levels]) for group in GROUPS]
    model = tiny.decoder()
    plain = dpo.loss(DPO(kind="dpo"), cached_reference)
    straight, gradients = loss_and_gradients(model, plain(model, laid_out(GROUPS, references=REFERENCES)))
    reverse, other = loss_and_gradients(model, plain(model, laid_out(turned, references=REFERENCES)))
    mixed = {name: 0.7 * gradient + 0.3 * other[name] for name, gradient in gradients.items()}
    smoothed = dpo.loss(DPO(kind="dpo", label_smoothing=0.3), cached_reference)
    found = loss_and_gradients(model, smoothed(model, laid_out(GROUPS, references=REFERENCES)))
    assert_same(found, (0.7 * straight + 0.3 * reverse, mixed))


@torch.no_grad()
def test_orpo() -> None:
    _, means = sums_and_means(GROUPS)

    def formula(better: int, worse: int) -> float:
        return -means[better] - 0.4 * log_sigmoid(log_odds(means[better]) - log_odds(means[worse]))

    output = orpo.loss(ORPO(kind="orpo", beta=0.4))(tiny.decoder(), laid_out(GROUPS))
    assert output.sums[POLICY].item() == pytest.approx(per_pair(GROUPS, formula), rel=1e-5)
    metrics = {name: float(value) for name, (value, _) in output.metrics.items()}
    assert metrics["nll"] == pytest.approx(per_pair(GROUPS, lambda better, _: -means[better]), rel=1e-5)
    ratio = per_pair(GROUPS, lambda better, worse: log_odds(means[better]) - log_odds(means[worse]))
    assert metrics["log_odds_ratio"] == pytest.approx(ratio, abs=1e-5)


@torch.no_grad()
def test_simpo() -> None:
    _, means = sums_and_means(GROUPS)
    output = simpo.loss(SimPO(kind="simpo", beta=2.5, gamma=0.5))(tiny.decoder(), laid_out(GROUPS))
    expected = per_pair(GROUPS, lambda better, worse: -log_sigmoid(2.5 * (means[better] - means[worse]) - 0.5))
    assert output.sums[POLICY].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_kto() -> None:
    sums, _ = sums_and_means(LABELLED)
    settings = KTO(kind="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    output = kto.loss(settings, cached_reference)(tiny.decoder(), laid_out(LABELLED, references=REFERENCES[:5], kl=KL))
    ratios = [logprob - reference for logprob, reference in zip(sums, REFERENCES[:5], strict=True)]
    good, bad = ratios[::2], ratios[1::2]
    expected = sum(1.5 * (1 - 1 / (1 + math.exp(-0.2 * (ratio - KL)))) for ratio in good)
    expected += sum(0.5 * (1 - 1 / (1 + math.exp(-0.2 * (KL - ratio)))) for ratio in bad)
    assert output.sums[POLICY].item() == pytest.approx(expected, rel=1e-5)
    metrics = {name: float(value) / weight for name, (value, weight) in output.metrics.items()}
    assert metrics == pytest.approx(
        {
            "reward_good": 0.2 * sum(good) / 3,
            "reward_bad": 0.2 * sum(bad) / 2,
            "accuracy": (sum(ratio > KL for ratio in good) + sum(ratio < KL for ratio in bad)) / 5,
            "kl": KL,
        },
        rel=1e-5,
    )


def test_kto_where_the_policy_is_the_reference_costs_one_half() -> None:
    model = tiny.decoder()
    references = answer_logprobs(model, laid_out(LABELLED)).tolist()
    output = kto.loss(KTO(kind="kto"), cached_reference)(model, laid_out(LABELLED, references=references, kl=0.0))
    assert output.sums[POLICY].item() == 2.5


def test_divergence_of_answers_to_other_prompts() -> None:
    """The sum of log-ratios, without a gradient."""
    answers = [group.answers[0] for group in LABELLED]
    mismatched = [group._replace(answers=[answers[index - 1]]) for index, group in enumerate(LABELLED)]
    sums, _ = sums_and_means(mismatched)
    micros = [
        laid_out(mismatched[:2], references=REFERENCES[:2]),
        laid_out(mismatched[2:], references=REFERENCES[2:5]),
        without_weight(laid_out(mismatched[:1], references=REFERENCES[:1])),
    ]
    total, num = kto.divergence(tiny.decoder(), micros, cached_reference)
    assert total.item() == pytest.approx(sum(sums) - sum(REFERENCES[:5]), rel=1e-5)
    assert num == 5
    assert not total.requires_grad


@pytest.mark.parametrize("name", losses())
def test_how_groups_are_cut_into_micro_batches_does_not_matter(name: str) -> None:
    model = scorer() if name == "reward_model" else tiny.decoder()
    groups, kl = (LABELLED, KL) if name == "kto" else (GROUPS, None)
    loss = losses()[name]
    references = REFERENCES[: sum(len(group.answers) for group in groups)]
    whole = loss_and_gradients(model, loss(model, laid_out(groups, references=references, kl=kl)))
    total, gradients, metrics = torch.zeros(()), dict[str, Tensor](), dict[str, float]()
    first = 0
    for group in groups:
        num = len(group.answers)
        micro = laid_out([group], references=REFERENCES[first : first + num], kl=kl)
        for part in (micro, without_weight(micro)):
            output = loss(model, part)
            one, of_part = loss_and_gradients(model, output)
            total = total + one
            gradients = {key: gradients.get(key, 0.0) + gradient for key, gradient in of_part.items()}
            metrics = {key: metrics.get(key, 0.0) + float(value) for key, (value, _) in output.metrics.items()}
        first += num
    assert_same((total, gradients), whole)
    expected = loss(model, laid_out(groups, references=references, kl=kl)).metrics
    assert metrics == pytest.approx({key: float(value) for key, (value, _) in expected.items()}, rel=1e-5, abs=1e-6)
