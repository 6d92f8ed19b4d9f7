"""How far a student's next-token distribution is from a teacher's, a chunk of rows at a time.

With p the student's distribution, t the teacher's and m = beta t + (1 - beta) p their mixture, this is the
generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1):

    D = beta KL(t || m) + (1 - beta) KL(p || m),   0 < beta < 1
    D = KL(t || p) for beta = 0,   D = KL(p || t) for beta = 1

As in TRL, the ends are the plain divergences and no limits: D itself goes to 0 there, and D / beta to KL(t || p)
as beta goes to 0. So a small beta has a small loss, and 0 has a large one.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.models.loss_head import HeadGradients, compute_dtype, logits_of, rows_per_chunk, saved_gradients


class Predictions(NamedTuple):
    """What logits are made of: hidden [N, D] before the head, the head's weight [V, D] and bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Predictions,
        beta: float,
        temperature: float,
    ) -> Tensor:
        vocabulary = min(weight.shape[0], teacher.weight.shape[0])
        needed = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
        gradients = HeadGradients(hidden, weight, bias, needed)
        student = _first_tokens(Predictions(hidden, weight, bias), vocabulary)
        teacher = _first_tokens(teacher, vocabulary)
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = rows_per_chunk(hidden, student.weight)
        # Inside a custom function autocast would cast again, and undo the float32 of the reductions.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                ours, theirs = (_logprobs(side, part, temperature) for side in (student, teacher))
                value, grad = divergence_and_gradient(ours, theirs, beta)
                total += value
                if gradients.are_needed:
                    gradients.add(grad.div_(temperature), part, student.hidden[part], student.weight)
        gradients.save(ctx, weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad_total), None, None, None


def divergence_and_gradient(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence summed over rows, and its gradient [N, V] by the student's logits.

    Args:
        student: float32 log-probabilities [N, V].
        teacher: as many.
    """
    p = student.exp()
    if beta == 0:
        t = teacher.exp()
        return (t * (teacher - student)).sum(), p.sub_(t)
    if beta == 1:
        ratio = student - teacher
        kl = (p * ratio).sum(1, keepdim=True)
        return kl.sum(), p.mul_(ratio.sub_(kl))
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum()
    ratio = student - mixture
    kl = (p * ratio).sum(1, keepdim=True)
    # That the mixture changes with p adds a constant to all tokens' derivatives, which a softmax does not feel.
    return beta * of_teacher + (1 - beta) * kl.sum(), p.mul_(ratio.sub_(kl)).mul_(1 - beta)


def _first_tokens(side: Predictions, vocabulary: int) -> Predictions:
    """In the dtype to compute in, without the tokens that only one of the two has."""
    dtype = compute_dtype(side.hidden)
    bias = None if side.bias is None else side.bias[:vocabulary]
    return Predictions(side.hidden.to(dtype), side.weight[:vocabulary].to(dtype), bias)


def _logprobs(side: Predictions, part: slice, temperature: float) -> Tensor:
    return logits_of(side.hidden[part], side.weight, side.bias).div_(temperature).log_softmax(1)


def linear_divergence(student: Predictions, teacher: Predictions, beta: float, temperature: float = 1.0) -> Tensor:
    """Sum over rows of the divergence between softmax(student's logits / temperature) and the teacher's, in nats.

    The gradients of the student are computed in the forward, so that neither backward nor anything that is kept for
    it needs the teacher. The logits of both are never whole, and are reduced in float32.

    Args:
        student: hidden [N, D], weight [V, D].
        teacher: hidden [N, E] of the same rows, weight [V', E]; gets no gradient. Of V and V' the smaller is the
            vocabulary that both are compared over: what else one has are rows that only fill up its embedding.
        beta: from 0, KL(teacher || student), to 1, KL(student || teacher).

    Returns:
        A float32 scalar.
    """
    hidden, weight, bias = student
    if not torch.is_grad_enabled():  # which the function itself cannot tell, and gradients are most of its work
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    taught = Predictions(*(None if tensor is None else tensor.detach() for tensor in teacher))  # type: ignore[arg-type]
    total: Tensor = _DivergenceSum.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, taught, beta, temperature
    )
    return total
