"""Reliability and its error."""

import numpy as np
import pytest

from llmtrain.evaluation.calibration import Bin, expected_error, reliability


def test_bins_by_hand() -> None:
    bins = reliability([0.05, 0.15, 0.12, 1.0, 0.9], [0, 1, 0, 1, 0])
    assert bins == [
        Bin(0.0, pytest.approx(0.1), 1, 1.0, pytest.approx(0.05), 0.0),
        Bin(pytest.approx(0.1), pytest.approx(0.2), 2, 2.0, pytest.approx(0.135), 0.5),
        Bin(pytest.approx(0.9), 1.0, 2, 2.0, pytest.approx(0.95), 0.5),
    ]
    assert expected_error(bins) == pytest.approx((0.05 + 2 * 0.365 + 2 * 0.45) / 5)


def test_a_weight_of_two_is_the_prediction_twice() -> None:
    generator = np.random.default_rng(0)
    p, y = 0.5 + 0.5 * generator.random(40), generator.random(40) < 0.6
    weighed = reliability(p, y, 1.0 + (np.arange(40) < 10), least=0.5)
    twice = reliability(np.concatenate([p, p[:10]]), np.concatenate([y, y[:10]]), least=0.5)
    assert expected_error(weighed) == pytest.approx(expected_error(twice))
    assert sum(found.weight for found in weighed) == 50 and sum(found.count for found in weighed) == 40
    assert twice[0].low == 0.5


def test_what_is_drawn_as_it_is_said_is_calibrated() -> None:
    generator = np.random.default_rng(1)
    p = generator.random(100_000)
    assert expected_error(reliability(p, generator.random(len(p)) < p)) < 0.01
    assert expected_error(reliability(p, generator.random(len(p)) < p**2)) > 0.1
