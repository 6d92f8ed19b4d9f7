"""Held-out figures of process reward models against all steps at once; the loss is proven in tests/truths."""

import pytest
import torch
from torch.nn import functional as F

from llmtrain.algorithms import process_reward
from llmtrain.evaluation.calibration import expected_error, reliability
from llmtrain.models.decoder import Decoder
from tests.answers import drawn_steps, scorer, steps_laid_out, without_weight

CPU = torch.device("cpu")
ANSWERS = [
    drawn_steps(12, {2: 1.0, 5: 1.0, 11: 0.0}, seed=0),
    drawn_steps(7, {3: 1.0, 6: 1.0}, seed=1),
    drawn_steps(9, {1: 0.0, 4: 1.0, 8: 0.0}, seed=2),
]


def model() -> Decoder:
    """Whose judgements differ."""
    found = scorer(num_labels=2)
    with torch.no_grad():
        found.hf.score.weight.mul_(30)
    return found


@torch.no_grad()
def test_figures() -> None:
    batches = [steps_laid_out(ANSWERS[:2]), steps_laid_out(ANSWERS[2:])]
    figures = process_reward.HeldOutSteps([*batches, without_weight(batches[0])]).figures(model(), CPU)
    logits = process_reward.step_logits(model(), steps_laid_out(ANSWERS))
    labels = steps_laid_out(ANSWERS).tensors["labels"]
    probabilities = logits.softmax(1)[:, 1]
    found = (probabilities > 0.5) == labels.bool()
    right, wrong = (found[labels == label].float().mean().item() for label in (1, 0))
    expected = {
        "loss": F.cross_entropy(logits, labels.long()).item(),
        "accuracy": found.float().mean().item(),
        "balanced_accuracy": (right + wrong) / 2,
        "share_right": 5 / 8,
        "ece": expected_error(reliability(probabilities.tolist(), labels.tolist())),
    }
    assert 0 < expected["accuracy"] < 1
    assert figures == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_of_right_steps_alone_the_balance_is_theirs() -> None:
    figures = process_reward.HeldOutSteps([steps_laid_out([ANSWERS[1]])]).figures(model(), CPU)
    assert figures["balanced_accuracy"] == figures["accuracy"]
    assert figures["share_right"] == 1


def test_without_rows_there_are_no_figures() -> None:
    assert process_reward.HeldOutSteps([]).figures(model(), CPU) == {}
