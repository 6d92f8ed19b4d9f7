"""The odds of ORPO where probabilities are near 0 and 1; the loss is proven in tests/truths."""

import torch

from llmtrain.algorithms.orpo import log_odds


def test_log_odds_are_those_of_float64() -> None:
    logprobs = -torch.logspace(-6, 2, 100)
    wide = logprobs.double()
    expected = wide - torch.log(-torch.expm1(wide))
    torch.testing.assert_close(log_odds(logprobs), expected.float(), rtol=1e-6, atol=1e-6)


def test_odds_of_one_half_are_even() -> None:
    assert log_odds(torch.tensor([0.5]).log()).abs().item() < 1e-6


def test_certain_tokens_have_finite_odds_and_gradients() -> None:
    """A mean log-probability that float32 rounds to 0."""
    logprobs = torch.tensor([0.0, -1e-12, -1e-6, -200.0], requires_grad=True)
    odds = log_odds(logprobs)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()
