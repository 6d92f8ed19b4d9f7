"""The chunked head equals the plain one: loss, log-probs, entropy, and every gradient."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.models import loss_head
from llmtrain.models.loss_head import (
    IGNORE_INDEX,
    bias_without,
    linear_cross_entropy,
    linear_logprobs,
    linear_rowwise,
)

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


@pytest.mark.parametrize("bias", [False, True])
def test_weighted_rows_equal_the_plain_weighted_sum(bias):
    """Weights of any size, zero and negative ones too; gradients of the states, the head and its bias."""
    hidden, weight, b, targets = inputs(bias, torch.float32)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1)) * 10
    weights[3:9] = 0
    ours = linear_cross_entropy(hidden, weight, targets, b, weights)
    rows = F.cross_entropy(F.linear(hidden, weight, b), targets, ignore_index=IGNORE_INDEX, reduction="none")
    plain = (rows * weights).sum()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for a, e in zip(gradients(ours * 0.37, hidden, weight, b), gradients(plain * 0.37, hidden, weight, b), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    same = linear_cross_entropy(hidden, weight, targets, b, torch.ones(N))
    assert same.item() == pytest.approx(linear_cross_entropy(hidden, weight, targets, b).item(), rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_rowwise_functions_equal_those_of_whole_logits(bias):
    hidden, weight, b, targets = inputs(bias, torch.float32)
    targets = targets.clamp_min(0)

    def function(logits, part):
        return logits.square().logsumexp(1) - logits.gather(1, targets[part][:, None])[:, 0].exp()

    ours = linear_rowwise(hidden, weight, b, function)
    plain = function(F.linear(hidden, weight, b), slice(None))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    mix = torch.linspace(-1, 1, N)
    for a, e in zip(
        gradients((ours * mix).sum(), hidden, weight, b), gradients((plain * mix).sum(), hidden, weight, b), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3 * e.abs().max().item())


def test_rowwise_chunks_are_computed_again_and_not_kept():
    """The largest tensor that backward keeps is no chunk of logits."""
    hidden, weight, _, _ = inputs(False, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        linear_rowwise(hidden, weight, None, lambda logits, part: logits.exp().sum(1)).sum()
    assert kept and all(shape != (64, V) and shape != (N, V) for shape in kept)


@pytest.mark.parametrize("head", ["weighted", "rowwise"])
def test_no_rows_are_a_loss_of_zero_with_gradients(head):
    """As of a micro-batch in which nothing was masked: sharding engines wait for its backward."""
    _, weight, _, _ = inputs(False, torch.float32)
    states = torch.randn(3, D, requires_grad=True)
    none = states[:0]
    if head == "weighted":
        loss = linear_cross_entropy(none, weight, torch.empty(0, dtype=torch.int64), None, torch.empty(0))
    else:
        loss = linear_rowwise(none, weight, None, lambda logits, part: logits.logsumexp(1)).sum()
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, states, weight))


@pytest.mark.parametrize("bias", [False, True])
def test_a_token_without_probability(bias):
    """As if its row of the head were not there; that row gets no gradient, and entropy stays finite."""
    hidden, weight, b, targets = inputs(bias, torch.float32)
    left_out = 7
    targets[targets == left_out] = 8
    head = torch.nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias:
            head.bias.copy_(b)
    others = [token for token in range(V) if token != left_out]
    counted = targets != IGNORE_INDEX
    renumbered = torch.where(counted, targets - (targets > left_out).long(), targets)
    plain_bias = head.bias[others] if bias else None
    plain = F.cross_entropy(
        F.linear(hidden, head.weight[others], plain_bias), renumbered, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    parameters = [hidden, *head.parameters()]
    expected = torch.autograd.grad(plain, parameters)
    ours = linear_cross_entropy(hidden, head.weight, targets, bias_without(head, left_out))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for a, e in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert (
        torch.autograd.grad(
            linear_cross_entropy(hidden, head.weight, targets, bias_without(head, left_out)), head.weight
        )[0][left_out]
        .eq(0)
        .all()
    )
    logprobs, entropy = linear_logprobs(hidden, head.weight, targets, bias_without(head, left_out))
    torch.testing.assert_close(-logprobs.sum(), plain, rtol=1e-6, atol=0)
    assert entropy.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, head.weight, targets, bias_without(head, left_out))
    assert rounded.item() == pytest.approx(plain.item(), rel=1e-2)


class Operations(TorchDispatchMode):
    """While it is on: the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


def test_without_gradients_none_are_computed():
    """Evaluation asks for the loss alone; the gradients would be most of the work."""
    hidden, weight, b, targets = inputs(True, torch.float32)
    of_gradients = torch.ops.aten.scatter_add_.default
    with torch.no_grad(), Operations() as alone:
        loss = linear_cross_entropy(hidden, weight, targets, b)
    assert alone.seen and of_gradients not in alone.seen
    with Operations() as both:
        assert loss.item() == linear_cross_entropy(hidden, weight, targets, b).item()
    assert of_gradients in both.seen


MANY_SHAPES = """
import random, torch
from llmtrain.models.loss_head import linear_cross_entropy
from llmtrain.observe.memory import peak_memory_bytes
weight, chooser, peaks = torch.randn(4096, 384, requires_grad=True), random.Random(0), []
for _ in range(60):
    num = chooser.randint(400, 1300)
    hidden = torch.randn(num, 384, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, torch.zeros(num, dtype=torch.int64)).backward()
    peaks.append(peak_memory_bytes(torch.device("cpu")))
print(peaks[-1] - peaks[19])
"""


def test_memory_does_not_grow_with_the_numbers_of_rows_that_were_seen():
    """Of masked tokens there is another number in every step, and oneDNN keeps what it makes for each shape."""
    grown = int(subprocess.run([sys.executable, "-c", MANY_SHAPES], check=True, capture_output=True).stdout)
    assert grown < 100e6  # it was 300 MB
