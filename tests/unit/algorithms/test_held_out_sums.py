"""Figures of held-out micro-batches, and calibration, against what one pass over everything gives."""

import pytest
import torch

from llmtrain.algorithms import simpo
from llmtrain.algorithms.held_out_sums import HeldOutSums, calibration_sums
from llmtrain.contracts import POLICY
from llmtrain.evaluation.calibration import expected_error, reliability
from llmtrain.recipe.schema import SimPO
from tests import tiny
from tests.answers import drawn_group, laid_out, without_weight

CPU = torch.device("cpu")
GROUPS = [drawn_group(2 + seed, [4, 2 + seed, 3], [1, 2, 2], seed) for seed in range(3)]
LOSS = simpo.loss(SimPO(kind="simpo"))


@torch.no_grad()
def test_figures_are_the_loss_and_its_metrics_divided_once() -> None:
    model = tiny.decoder()
    batches = [laid_out(GROUPS[:2], "shared"), laid_out(GROUPS[2:], "shared")]
    figures = HeldOutSums([*batches, without_weight(batches[0])], LOSS).figures(model, CPU)
    whole = LOSS(model, laid_out(GROUPS))
    expected = {name: float(value) / weight for name, (value, weight) in whole.metrics.items()}
    assert figures == pytest.approx({"loss": whole.sums[POLICY].item() / 3, **expected}, rel=1e-5, abs=1e-6)


def test_without_rows_there_are_no_figures() -> None:
    assert HeldOutSums([], LOSS).figures(tiny.decoder(), CPU) == {}


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_calibration_sums_give_the_expected_calibration_error(low: float) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = low + (1 - low) * torch.rand(200, generator=generator)
    observed, weights = torch.bernoulli(predicted, generator=generator), torch.rand(200, generator=generator)
    parts = [calibration_sums(predicted[p], observed[p], weights[p], low) for p in (slice(0, 70), slice(70, 200))]
    error = (sum(parts, torch.zeros(())).abs().sum() / weights.sum()).item()
    bins = reliability(predicted.tolist(), observed.tolist(), weights.tolist(), low)
    assert error == pytest.approx(expected_error(bins), rel=1e-5)


def test_certain_predictions_are_in_the_last_bin_and_right_ones_cost_nothing() -> None:
    sums = calibration_sums(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.ones(2))
    assert sums.tolist() == [-1.0] + [0.0] * 9
