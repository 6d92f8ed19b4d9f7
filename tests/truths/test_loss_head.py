"""The chunked head equals the plain one: loss, log-probs, entropy, and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.models import loss_head
from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy, linear_logprobs

N, D, V = 200, 16, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 64 rows: 200 rows are three whole ones and a rest."""
    monkeypatch.setitem(loss_head.CHUNK_ELEMENTS, "cpu", 1)


def inputs(bias: bool, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    b = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(V, (N,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return hidden, weight, b, targets


def gradients(value, *tensors):
    return torch.autograd.grad(value, [t for t in tensors if t is not None])


@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_sum_and_gradients_equal_the_plain_loss(bias):
    hidden, weight, b, targets = inputs(bias, torch.float32)
    ours = linear_cross_entropy(hidden, weight, targets, b)
    plain = F.cross_entropy(F.linear(hidden, weight, b), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for a, e in zip(gradients(ours * 0.37, hidden, weight, b), gradients(plain * 0.37, hidden, weight, b), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_gradients_equal_the_plain_ones(bias, temperature):
    hidden, weight, b, targets = inputs(bias, torch.float32)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, b, temperature)
    all_logprobs = torch.log_softmax(F.linear(hidden, weight, b) / temperature, dim=1)
    counted = targets != IGNORE_INDEX
    plain_logprobs = all_logprobs.gather(1, targets.clamp_min(0)[:, None])[:, 0] * counted
    plain_entropy = -(all_logprobs.exp() * all_logprobs).sum(1) * counted
    torch.testing.assert_close(logprobs, plain_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, plain_entropy, rtol=1e-5, atol=1e-5)
    # a loss that needs both, differently for each row
    mix = torch.linspace(-1, 1, N)
    ours = gradients((logprobs * mix + entropy * mix.square()).sum(), hidden, weight, b)
    plain = gradients((plain_logprobs * mix + plain_entropy * mix.square()).sum(), hidden, weight, b)
    for a, e in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_the_two_heads_agree():
    hidden, weight, _, targets = inputs(False, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, -linear_logprobs(hidden, weight, targets)[0].sum(), rtol=1e-6, atol=0)


def test_rows_that_do_not_count_change_nothing():
    hidden, weight, _, targets = inputs(False, torch.float32)
    other = hidden.detach().clone()
    other[::7] = 1e4
    assert linear_cross_entropy(hidden, weight, targets).item() == linear_cross_entropy(other, weight, targets).item()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    assert nothing.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(nothing, hidden, weight))


def test_a_frozen_head_or_frozen_states_get_no_gradient():
    hidden, weight, _, targets = inputs(False, torch.float32)
    frozen = weight.detach()
    linear_cross_entropy(hidden, frozen, targets).backward()
    assert hidden.grad is not None
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert weight.grad is not None


@pytest.mark.parametrize("head", [linear_cross_entropy, lambda *a: -linear_logprobs(*a)[0].sum()])
def test_autocast_computes_in_bf16_and_reduces_in_fp32(head):
    hidden, weight, _, targets = inputs(False, torch.float32)
    exact = head(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(hidden, weight, targets)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() - exact.item()) / exact.item() < 1e-2
    assert gradients(rounded, weight)[0].dtype == torch.float32


def test_a_gradient_larger_than_bf16_can_add_survives_many_chunks():
    """Weight gradients of bf16 chunks are added in float32: bf16 would stop counting at 256."""
    rows = 64 * 600
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    (gradient,) = gradients(linear_cross_entropy(hidden, weight, targets), weight)
    torch.testing.assert_close(gradient.float(), torch.tensor([[-rows / 2], [rows / 2]]), rtol=1e-2, atol=0)
