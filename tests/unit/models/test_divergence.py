"""The divergence a chunk of rows at a time equals that of whole logits, by autograd: values and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.models import loss_head
from llmtrain.models.divergence import Predictions, linear_divergence

N, D, E, V = 200, 16, 24, 50
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows: 200 rows are three whole ones and a rest."""
    monkeypatch.setitem(loss_head.CHUNK_ELEMENTS, "cpu", 1)


def side(width: int, vocabulary: int = V, *, bias: bool = False, seed: int = 0, trained: bool = True) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, width), (vocabulary, width), *([(vocabulary,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator) * 0.5 for shape in shapes]
    return Predictions(*(t.requires_grad_(trained) for t in tensors), *([] if bias else [None]))  # type: ignore[arg-type]


def logits(predictions: Predictions, vocabulary: int = V) -> Tensor:
    found = torch.nn.functional.linear(predictions.hidden, predictions.weight, predictions.bias)
    return found[:, :vocabulary]


def plain(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """The slow twin: by the definition, of whole logits."""
    p, t = (torch.softmax(z.double() / temperature, 1) for z in (student, teacher))
    if beta == 0:
        return (t * (t / p).log()).sum()
    if beta == 1:
        return (p * (p / t).log()).sum()
    m = beta * t + (1 - beta) * p
    return beta * (t * (t / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def gradients(value: Tensor, predictions: Predictions) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [tensor for tensor in predictions if tensor is not None])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sum_and_gradients_equal_the_definitions(beta: float, bias: bool, temperature: float) -> None:
    student, teacher = side(D, bias=bias), side(E, bias=bias, seed=1)
    ours = linear_divergence(student, teacher, beta, temperature)
    theirs = plain(logits(student), logits(teacher).detach(), beta, temperature)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)
    for a, e in zip(gradients(ours * 0.37, student), gradients(theirs * 0.37, student), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = side(D), side(E, seed=1)
    linear_divergence(student, teacher, 0.5).backward()
    assert student.hidden.grad is not None and student.weight.grad is not None
    assert teacher.hidden.grad is None and teacher.weight.grad is None


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_what_is_frozen_gets_none_either(which: str) -> None:
    """As the head under an adapter; and what is trained gets the same as ever."""
    whole, teacher = side(D), side(E, seed=1)
    expected = dict(zip(("hidden", "weight"), gradients(linear_divergence(whole, teacher, 0.3), whole), strict=True))
    partly = whole._replace(**{which: getattr(whole, which).detach()})
    linear_divergence(partly, teacher, 0.3).backward()
    other = "weight" if which == "hidden" else "hidden"
    assert torch.equal(getattr(whole, other).grad, expected[other]) and getattr(whole, which).grad is None


@pytest.mark.parametrize(("ours", "theirs"), [(V, V + 14), (V + 14, V)])
@pytest.mark.parametrize("beta", BETAS)
def test_the_smaller_vocabulary_is_compared(ours: int, theirs: int, beta: float) -> None:
    """Rows that fill up an embedding take no part: they get no gradient, and what is in them changes nothing."""
    student, teacher = side(D, ours, bias=True), side(E, theirs, bias=True, seed=1)
    found = linear_divergence(student, teacher, beta)
    expected = plain(logits(student), logits(teacher).detach(), beta)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    grads = gradients(found, student)
    for a, e in zip(grads, gradients(expected, student), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    assert grads[1][V:].count_nonzero() == 0


@pytest.mark.parametrize("beta", BETAS)
def test_no_rows_are_a_loss_of_zero_with_gradients(beta: float) -> None:
    """As of a micro-batch that fills up a rank: sharding engines wait for its backward."""
    student, teacher = side(D), side(E, seed=1)
    loss = linear_divergence(
        student._replace(hidden=student.hidden[:0]), teacher._replace(hidden=teacher.hidden[:0]), beta
    )
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, student))


@pytest.mark.parametrize("beta", BETAS)
def test_autocast_computes_in_bf16_and_reduces_in_fp32(beta: float) -> None:
    student, teacher = side(D), side(E, seed=1)
    exact = linear_divergence(student, teacher, beta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_divergence(student, teacher, beta)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() - exact.item()) / exact.item() < 2e-2
    for a, e in zip(gradients(rounded, student), gradients(exact, student), strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() / e.norm() < 2e-2


def test_a_teacher_in_bf16_beside_a_student_in_float32() -> None:
    student, teacher = side(D), side(E, seed=1, trained=False)
    half = Predictions(teacher.hidden.bfloat16(), teacher.weight.bfloat16(), None)
    exact = linear_divergence(student, teacher, 0.5).item()
    assert linear_divergence(student, half, 0.5).item() == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_without_probability_leave_it_finite(beta: float) -> None:
    """Of a teacher that is sure, and of a student that is: 0 log 0 is 0."""
    student, teacher = (Predictions(torch.eye(4) * sure, torch.eye(4).requires_grad_(), None) for sure in (30.0, 200.0))
    loss = linear_divergence(student, teacher, beta)
    assert loss.isfinite() and all(
        gradient.isfinite().all() for gradient in gradients(loss, student._replace(hidden=None))
    )


class Shapes(TorchDispatchMode):
    """While it is on: the shapes that operations give, and their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        self.shapes |= {
            tuple(t.shape) for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)
        }
        return result


def test_logits_are_never_whole_and_nothing_of_the_teacher_is_kept() -> None:
    student, teacher = side(D), side(E, seed=1)
    kept: list[Tensor] = []
    with Shapes() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_divergence(student, teacher, 0.5)
    assert (64, V) in seen.shapes and not any(shape[:1] == (N,) and V in shape for shape in seen.shapes)
    assert {tuple(tensor.shape) for tensor in kept} == {(N, D), (V, D)}


def test_without_gradients_none_are_computed() -> None:
    """Evaluation asks for the loss alone; the gradients would be most of the work."""
    student, teacher = side(D), side(E, seed=1)
    with torch.no_grad(), Shapes() as alone:
        loss = linear_divergence(student, teacher, 0.5)
    with Shapes() as both:
        assert loss.item() == linear_divergence(student, teacher, 0.5).item()
    products = [sum(name.startswith(("aten.mm", "aten.addmm")) for name in seen.names) for seen in (alone, both)]
    assert products == [8, 16]  # of four chunks: the logits of both; and the gradients of states and head
