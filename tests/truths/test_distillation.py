"""Distillation is the divergence that it says, of the tokens that it says, by whoever wrote them."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmtrain.algorithms.distillation import Taught
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.loader import evaluation_batches
from llmtrain.models.divergence import Predictions, linear_divergence
from llmtrain.models.loss_head import linear_cross_entropy
from llmtrain.recipe import schema
from tests.distilling import Frozen, case


def logits(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Whole ones, [N, V], of the counted positions."""
    tensors = micro.tensors
    whole: Tensor = model(tensors["input_ids"], tensors["position_ids"], lambda hidden, head: head(hidden))
    return whole.flatten(0, 1)[tensors["counted"]]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """The slow twin: by the definition, of whole logits."""
    p, t = torch.softmax(student / temperature, 1), torch.softmax(teacher.detach() / temperature, 1)
    if beta in (0, 1):
        return kl(t, p) if beta == 0 else kl(p, t)
    m = beta * t + (1 - beta) * p
    return beta * kl(t, m) + (1 - beta) * kl(p, m)


def as_predictions(scores: Tensor) -> Predictions:
    """Logits [N, V] as the states of a head that changes nothing."""
    return Predictions(scores, torch.eye(scores.shape[1]), None)


# ------------------------------------------------------------------------------------------ the divergence


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_are_the_two_kl_divergences_by_enumeration(beta: float) -> None:
    p, t = [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]
    student, teacher = (as_predictions(torch.tensor([probabilities]).log()) for probabilities in (p, t))
    first, second = (t, p) if beta == 0 else (p, t)
    expected = sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    assert linear_divergence(student, teacher, beta).item() == pytest.approx(expected, rel=1e-6)


def test_between_it_is_the_generalised_jensen_shannon_divergence_by_enumeration() -> None:
    p, t, beta = [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], 0.3
    m = [beta * b + (1 - beta) * a for a, b in zip(p, t, strict=True)]
    expected = sum(
        beta * b * math.log(b / c) + (1 - beta) * a * math.log(a / c) for a, b, c in zip(p, t, m, strict=True)
    )
    student, teacher = (as_predictions(torch.tensor([probabilities]).log()) for probabilities in (p, t))
    assert linear_divergence(student, teacher, beta).item() == pytest.approx(expected, rel=1e-6)


def test_at_a_half_it_is_symmetric_positive_and_at_most_log_2() -> None:
    scores = torch.randn(64, 2, 30, generator=torch.Generator().manual_seed(0))
    for one, other in (scores * torch.logspace(-1, 2, 64)[:, None, None]).unbind(0):
        a, b = as_predictions(one[None]), as_predictions(other[None])
        there, back = linear_divergence(a, b, 0.5).item(), linear_divergence(b, a, 0.5).item()
        assert there == pytest.approx(back, rel=1e-5)
        assert 0 < there <= math.log(2) * (1 + 1e-6)


@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_near_the_ends_it_is_a_share_of_the_kl_divergence(beta: float) -> None:
    """The limit is 0, and not the plain divergence that stands at the end itself."""
    a, b = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(1)).unbind(0)
    near = linear_divergence(as_predictions(a), as_predictions(b), beta).item() / min(beta, 1 - beta)
    end = linear_divergence(as_predictions(a), as_predictions(b), round(beta)).item()
    assert near == pytest.approx(end, rel=1e-2)


def test_of_a_teacher_that_is_sure_the_forward_divergence_is_cross_entropy() -> None:
    """Value and gradient: the teacher's own entropy is 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    targets = torch.randint(20, (40,), generator=generator)
    teacher = as_predictions(torch.nn.functional.one_hot(targets, 20) * 1e4)
    ours = linear_divergence(Predictions(hidden, weight, None), teacher, beta=0.0)
    theirs = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for a, e in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0)])
def test_the_loss_is_that_of_whole_logits_at_trained_tokens(beta: float, temperature: float, tmp_path: Path) -> None:
    """Sum, weight and the gradient of every parameter; of packed conversations."""
    distil = case(tmp_path, beta=beta, temperature=temperature)
    (micro, *_) = distil.made.micro_batches(0)
    found = distil.made.loss(distil.student, micro).sums[POLICY]
    # 420 rows of the teacher's embedding, and fewer tokens
    student, teacher = logits(distil.student, micro), logits(distil.teacher, micro)
    assert student.shape[1] < teacher.shape[1] == 420
    expected = divergence(student, teacher[:, : student.shape[1]], beta, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert micro.weights[POLICY] == len(student) == int((micro.tensors["targets"] >= 0).sum())
    parameters = list(distil.student.parameters())
    for a, e in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())
    assert all(p.grad is None and not p.requires_grad for p in distil.teacher.parameters())


def test_documents_of_a_row_are_apart_for_student_and_teacher(tmp_path: Path) -> None:
    distil = case(tmp_path)
    (micro, *_) = distil.made.micro_batches(0)
    ids, positions, documents = (micro.tensors[name] for name in ("input_ids", "position_ids", "document_ids"))
    assert int(documents.max()) > 1
    apart = 0.0
    for row in range(len(ids)):
        for document in range(int(documents[row].max()) + 1):
            here = documents[row] == document
            trained = (micro.tensors["targets"][row][here] >= 0).nonzero().squeeze(1)
            rows = {"input_ids": ids[row][here][None], "position_ids": positions[row][here][None]}
            tensors = rows | {"counted": trained}
            apart += distil.made.loss(distil.student, MicroBatch(tensors, {}, 0)).sums[POLICY].item()
    assert distil.made.loss(distil.student, micro).sums[POLICY].item() == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(beta: float, tmp_path: Path) -> None:
    distil = case(tmp_path)
    (micro, *_) = distil.made.micro_batches(0)
    settings = distil.recipe.algorithm.model_copy(update={"beta": beta})
    assert isinstance(settings, schema.Distillation)
    loss = Taught(settings, Frozen(distil.student)).loss(distil.student, micro).sums[POLICY]
    assert abs(loss.item()) < 1e-4
    gradients = torch.autograd.grad(loss, list(distil.student.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-4


def test_held_out_figures(tmp_path: Path) -> None:
    """loss is the divergence per token; nll, perplexity and bits per byte are of the text."""
    distil = case(tmp_path, beta=0.0)
    with distil.engine.evaluating():
        figures = distil.made.held_out.figures(distil.student, torch.device("cpu"))
    batches = evaluation_batches(distil.datasets.validation, 16, 4, rank=0, world_size=1)
    tokens, apart, nats = 0.0, 0.0, 0.0
    for micro in batches:
        student, teacher = logits(distil.student, micro), logits(distil.teacher, micro)
        tokens += len(student)
        apart += divergence(student, teacher[:, : student.shape[1]], 0.0).item()
        targets = micro.tensors["targets"].flatten()[micro.tensors["counted"]]
        nats += torch.nn.functional.cross_entropy(student, targets, reduction="sum").item()
    assert figures.keys() == {"loss", "nll", "perplexity", "bits_per_byte"}
    assert figures["loss"] == pytest.approx(apart / tokens, rel=1e-5)
    assert figures["nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_a_student_comes_nearer_to_its_teacher(on_policy: float, tmp_path: Path) -> None:
    distil = case(tmp_path, on_policy=on_policy, beta=0.5)

    def apart() -> float:
        with distil.engine.evaluating():
            return distil.made.held_out.figures(distil.student, torch.device("cpu"))["loss"]

    before = apart()
    for step in range(20):
        batch = distil.made.micro_batches(step)
        total = sum(micro.weights[POLICY] for micro in batch)
        for number, micro in enumerate(batch):
            with distil.engine.accumulate(last=number == len(batch) - 1):
                distil.engine.backward(distil.made.loss(distil.student, micro).sums[POLICY] / total)
        distil.engine.step(1e-2)
    assert apart() < 0.95 * before
