"""The divergence against TRL's, of the same logits: values and gradients."""

import pytest
import torch

from llmtrain.models.divergence import Predictions, linear_divergence

gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed: pip install -e '.[test]'")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9, 3.0])
def test_it_is_trls(beta: float, temperature: float) -> None:
    """TRL takes logits: so ours are of heads that change nothing, and of real ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 25, 8, generator=generator, requires_grad=True)
    weight = torch.randn(60, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 25, 60, generator=generator) * 2
    labels = torch.randint(0, 60, (4, 25), generator=generator)
    labels[torch.rand(4, 25, generator=generator) < 0.3] = -100
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        hidden @ weight.t(), teacher, labels, beta=beta, temperature=temperature, reduction="sum"
    )
    counted = labels != -100
    ours = linear_divergence(
        Predictions(hidden[counted], weight, None),
        Predictions(teacher[counted], torch.eye(60), None),
        beta,
        temperature,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, e in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_the_mean_over_tokens_is_trls_batchmean() -> None:
    """What the loop divides the sum by: the tokens that count."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 10, 20, generator=generator).unbind(0)
    labels = torch.zeros(3, 10, dtype=torch.int64)
    labels[:, :4] = -100
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels)
    counted, eye = labels != -100, torch.eye(20)
    ours = linear_divergence(Predictions(student[counted], eye, None), Predictions(teacher[counted], eye, None), 0.5)
    torch.testing.assert_close(ours / counted.sum(), theirs, rtol=1e-5, atol=1e-6)
