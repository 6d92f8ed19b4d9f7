import math

import numpy as np
import pytest

from llmtrain.evaluation.figures import Figure, exponential, mean, ratio


def test_the_error_of_zeros_and_ones_is_binomial() -> None:
    figure = mean([1.0] * 30 + [0.0] * 70)
    assert figure.value == pytest.approx(0.3)
    assert figure.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert figure.rows == 100
    assert mean([1.0]) == Figure(1.0, None, 1)


def test_the_error_of_a_ratio_is_that_of_the_bootstrap() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(5, 200, 400).astype(float)
    sums = weights * random.normal(2.0, 0.5, 400)
    figure = ratio(sums, weights)
    chosen = random.integers(0, 400, (4000, 400))
    again = sums[chosen].sum(1) / weights[chosen].sum(1)
    assert figure.value == pytest.approx(sums.sum() / weights.sum())
    assert figure.stderr == pytest.approx(again.std(), rel=0.05)
    assert exponential(figure).stderr == pytest.approx(np.exp(again).std(), rel=0.06)


def test_figures_without_an_error() -> None:
    assert ratio([3.0], [2.0]) == Figure(1.5, None, 1)
    assert math.isnan(ratio([1.0, 2.0], [0.0, 0.0]).value)
    assert exponential(Figure(1000.0, None, 1)).value > 1e300
