"""Held-out figures of reward models against all scores at once; the loss is proven in tests/truths."""

import statistics

import pytest
import torch

from llmtrain.algorithms import reward_model
from llmtrain.algorithms.answers import answer_scores
from llmtrain.algorithms.held_out_sums import HeldOutSums
from llmtrain.evaluation.calibration import expected_error, reliability
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import RewardModel
from tests.answers import drawn_group, laid_out, scorer, without_weight

CPU = torch.device("cpu")
SETTINGS = RewardModel(kind="reward_model", centering=0.1)
GROUPS = [
    drawn_group(4, [5, 3], [1, 2], seed=0),
    drawn_group(2, [1, 8, 4], [2, 1, 3], seed=1),
    drawn_group(7, [3, 3, 2, 6], [1, 3, 1, 2], seed=2, margin=0.5),
]
BATCHES = [laid_out(GROUPS[:2], "shared"), laid_out(GROUPS[2:], "shared")]


def model() -> Decoder:
    """Whose scores are far apart."""
    found = scorer()
    with torch.no_grad():
        found.hf.score.weight.mul_(30)
    return found


@torch.no_grad()
def test_figures() -> None:
    figures = reward_model.HeldOutScores(SETTINGS, [*BATCHES, without_weight(BATCHES[0])]).figures(model(), CPU)
    scores = answer_scores(model(), laid_out(GROUPS)).tolist()
    differences, weights, best, first = [], [], [], 0
    for group in GROUPS:
        mine = scores[first : first + len(group.answers)]
        ranked = list(zip(mine, group.levels, strict=True))
        apart = [s - t for s, level in ranked for t, other in ranked if level < other]
        differences += apart
        weights += [1 / len(apart) for _ in apart]
        best += [score for score, level in ranked if level == min(group.levels)]
        first += len(mine)
    right = [float(difference > 0) for difference in differences]
    confidence = torch.tensor(differences).abs().sigmoid().tolist()
    trained = HeldOutSums(BATCHES, reward_model.loss(SETTINGS)).figures(model(), CPU)
    expected = {
        "loss": trained["loss"],
        "accuracy": sum(w * r for w, r in zip(weights, right, strict=True)) / 3,
        "margin": sum(w * d for w, d in zip(weights, differences, strict=True)) / 3,
        "ece": expected_error(reliability(confidence, right, weights, least=0.5)),
        "score_mean": statistics.mean(scores),
        "score_std": statistics.pstdev(scores),
        "best_score": statistics.mean(best),
    }
    assert len(best) == 4 and 0 < expected["accuracy"] < 1
    assert figures == pytest.approx(expected, rel=1e-4)
    assert trained == pytest.approx({name: figures[name] for name in trained}, rel=1e-4)


@torch.no_grad()
def test_how_rows_are_cut_does_not_matter() -> None:
    """So the figures of several ranks are those of one: all that they exchange is sums."""
    one = reward_model.HeldOutScores(SETTINGS, [laid_out([group]) for group in GROUPS]).figures(model(), CPU)
    assert one == pytest.approx(reward_model.HeldOutScores(SETTINGS, BATCHES).figures(model(), CPU), rel=1e-4)


@torch.no_grad()
def test_ties_are_certain_of_nothing_and_calibrated() -> None:
    indifferent = scorer()
    torch.nn.init.zeros_(indifferent.hf.score.weight)
    figures = reward_model.HeldOutScores(SETTINGS, BATCHES).figures(indifferent, CPU)
    found = [figures[name] for name in ("accuracy", "ece", "margin", "score_std")]
    assert found == pytest.approx([0.5, 0.0, 0.0, 0.0], abs=1e-6)


def test_without_rows_there_are_no_figures() -> None:
    assert reward_model.HeldOutScores(SETTINGS, []).figures(model(), CPU) == {}
