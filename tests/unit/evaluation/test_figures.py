import math

import numpy as np
import pytest

from llmtrain.evaluation.figures import Figure, auc, exponential, mean, ratio, wilson


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


@pytest.mark.parametrize(("share", "rows"), [(0.7, 5), (0.0, 20), (1.0, 3), (0.5, 1000)])
def test_wilsons_interval_ends_where_the_share_is_two_errors_off(share: float, rows: int) -> None:
    """Each end p is where (share - p)^2 = z^2 p (1 - p) / n."""
    for end in wilson(Figure(share, None, rows)):
        assert 0 <= end <= 1
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / rows, abs=1e-12)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.integers(0, 6, 30) + 1.0, generator.integers(0, 6, 20) + 0.0
    slow = np.mean([[0.5 * (1 + np.sign(p - n)) for n in negative] for p in positive])
    found = auc(positive, negative)
    assert found.value == pytest.approx(slow) and found.rows == 50
    assert auc([1.0], [0.0]) == Figure(1.0, None, 2)


def test_the_error_of_auc_is_how_far_it_strays() -> None:
    generator = np.random.default_rng(1)
    drawn = [auc(generator.normal(1, 1, 60), generator.normal(0, 1, 40)) for _ in range(2000)]
    strays = np.std([found.value for found in drawn])
    assert np.mean([found.stderr for found in drawn]) == pytest.approx(strays, rel=0.05)
