"""The language-model head and its loss, a chunk of rows at a time.

The logits of a batch, [tokens, vocabulary] in float32, are the largest tensor of a training step
(2 GiB at 4k tokens and a 128k vocabulary, three times that in backward). Here only a chunk of them
ever lives. All take the hidden states before the head and the head's weight:

    linear_cross_entropy  the loss sum; its gradients are computed chunk by chunk in the forward,
                          so no chunk is computed twice
    linear_logprobs       log-probability and entropy of each row, for losses that are functions of
                          them (RL, preferences); chunks are recomputed in backward
    linear_rowwise        any function of a row's logits; chunks are recomputed in backward

Logits are computed in the hidden states' dtype (autocast's where it is on), reductions over the
vocabulary in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a target that does not count, as in torch and transformers

EXCLUDED = -1e30  # a logit that leaves no probability

# Elements of one chunk of float32 logits. Small enough for a CPU's last-level cache to matter, and
# on a GPU for the chunk to be a small part of its memory; large enough for a full-speed GEMM.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}

# oneDNN, which multiplies bfloat16 on a CPU, keeps what it made for each shape: tens of megabytes for every number of
# rows that it has not seen, and how many tokens are masked or trained is another number in every step. So the last
# chunk is filled up, and there are few shapes.
_ROWS = 64


def rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """How many of the rows of hidden states make a chunk of logits."""
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    return max(_ROWS, elements // weight.shape[0] // _ROWS * _ROWS)


def _filled(rows: Tensor) -> Tensor:
    """Rows of zeros added to [n, D], where shapes have a price."""
    if rows.device.type != "cpu" or rows.dtype == torch.float32:
        return rows
    return F.pad(rows, (0, 0, 0, -len(rows) % _ROWS))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [n, D] @ matrix [D, E]."""
    return (_filled(rows) @ matrix)[: len(rows)]


def _sum_of_outer(one: Tensor, other: Tensor) -> Tensor:
    """The outer products of rows [n, D] and rows [n, E], summed: [D, E]."""
    return _filled(one).t() @ _filled(other)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What logits of these hidden states are computed in: autocast's dtype where it is on, else theirs."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits [rows, V] of hidden states [rows, D]."""
    logits = _product(hidden, weight.t()).float()
    return logits if bias is None else logits.add_(bias.float())


class HeadGradients:
    """Gradients of a head's inputs and weights, added up a chunk of rows at a time.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] of the head.
        bias: [V] of the head.
        needed: of which of the three; where of none, nothing is to be added.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]):
        of_hidden, of_weight, of_bias = needed
        self.hidden = torch.empty_like(hidden) if of_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None
        self.are_needed = any(needed)

    def add(self, grad: Tensor, part: slice, states: Tensor, matrix: Tensor) -> None:
        """Adds those of one chunk.

        Args:
            grad: float32 [n, V'], of its logits; a head may have more rows than the V' that were used.
            part: which of the rows it is.
            states: [n, D] its hidden states, in the dtype that the logits were computed in.
            matrix: [V', D] the weight in that dtype.
        """
        used = slice(grad.shape[1])
        if self.bias is not None:
            self.bias[used] += grad.sum(0)
        grad = grad.to(states.dtype)
        if self.hidden is not None:
            self.hidden[part] = _product(grad, matrix)
        if self.weight is not None:
            if grad.dtype == torch.float32:
                self.weight[used].addmm_(grad.t(), states)
            else:
                self.weight[used] += _sum_of_outer(grad, states)

    def save(self, ctx: Any, weight: Tensor) -> None:
        """Leaves them to `saved_gradients`."""
        ctx.save_for_backward(self.hidden, self.weight, self.bias)
        ctx.weight_dtype = weight.dtype


def saved_gradients(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients that were computed in the forward, times a scalar."""
    grad_h, grad_w, grad_b = ctx.saved_tensors
    # In float32: a factor rounded to bf16 would be the same error, up to 0.4 %, in every hidden gradient.
    scaled_h = None if grad_h is None else (grad_h.float() * factor).to(grad_h.dtype)
    scaled_w = None if grad_w is None else (grad_w * factor).to(ctx.weight_dtype)
    scaled_b = None if grad_b is None else (grad_b * factor).to(ctx.weight_dtype)
    return scaled_h, scaled_w, scaled_b


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        h, w = hidden.to(dtype), weight.to(dtype)
        needed = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
        gradients = HeadGradients(hidden, weight, bias, needed)
        loss = hidden.new_zeros((), dtype=torch.float32)

        rows = rows_per_chunk(hidden, weight)
        # Inside a custom function autocast would cast again, and undo the float32 of the reductions.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                counted = targets[part] != IGNORE_INDEX
                index = targets[part].clamp_min(0).unsqueeze(1)
                logp = logits_of(h[part], w, bias).log_softmax(1)
                logprobs = logp.gather(1, index).squeeze(1).masked_fill_(~counted, 0.0)
                loss -= logprobs.sum() if row_weights is None else logprobs.dot(row_weights[part])
                if not gradients.are_needed:
                    continue
                # d nll / d logits = softmax - onehot, and nothing for a row that does not count
                grad = logp.exp_()
                grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
                grad.masked_fill_(~counted.unsqueeze(1), 0.0)
                if row_weights is not None:
                    grad *= row_weights[part].unsqueeze(1)
                gradients.add(grad, part, h[part], w)
        gradients.save(ctx, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad_loss), None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Sum over counted rows of -log softmax(hidden @ weight.T + bias)[target], in nats.

    Args:
        hidden: [N, D] hidden states before the head.
        weight: [V, D] weight of the head.
        targets: [N] int64 token ids; IGNORE_INDEX where a row does not count.
        bias: [V] bias of the head.
        row_weights: float32 [N], what each row counts; 1 by default.

    Returns:
        A float32 scalar.
    """
    if not torch.is_grad_enabled():  # which the function itself cannot tell, and gradients are most of its work
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _CrossEntropySum.apply(hidden, weight, bias, targets, row_weights)  # type: ignore[no-untyped-call]
    return loss


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype, ctx.temperature = compute_dtype(hidden), temperature
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        num_rows = hidden.shape[0]
        logprobs, entropy, normalisers = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
        rows = rows_per_chunk(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_rows, rows):
                part = slice(start, start + rows)
                scaled = logits_of(h[part], w, bias).div_(temperature)
                normaliser = scaled.logsumexp(1)
                logprobs[part] = scaled.gather(1, targets[part].clamp_min(0).unsqueeze(1)).squeeze(1) - normaliser
                logp = scaled.sub_(normaliser.unsqueeze(1))
                entropy[part] = -(logp.exp() * logp).sum(1)
                normalisers[part] = normaliser
        counted = targets != IGNORE_INDEX
        logprobs.masked_fill_(~counted, 0.0)
        entropy.masked_fill_(~counted, 0.0)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, normalisers)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, normalisers = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        counted = (targets != IGNORE_INDEX).float()
        rows = rows_per_chunk(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                by_logprob = (grad_logprobs[part] * counted[part]).unsqueeze(1)
                by_entropy = (grad_entropy[part] * counted[part]).unsqueeze(1)
                logp = logits_of(h[part], w, bias).div_(ctx.temperature).sub_(normalisers[part].unsqueeze(1))
                p = logp.exp()
                # d logp_y / dz = onehot - p;  dH / dz = -p (log p + H)
                grad = -p * (by_logprob + by_entropy * (logp + entropy[part].unsqueeze(1)))
                grad.scatter_add_(1, targets[part].clamp_min(0).unsqueeze(1), by_logprob)
                grad.div_(ctx.temperature)
                gradients.add(grad, part, h[part], w)
        grad_w, grad_b = gradients.weight, gradients.bias
        return (
            gradients.hidden,
            None if grad_w is None else grad_w.to(weight.dtype),
            None if grad_b is None else grad_b.to(weight.dtype),
            None,
            None,
        )


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution, both differentiable.

    The distribution is softmax((hidden @ weight.T + bias) / temperature). Arguments as in
    `linear_cross_entropy`.

    Returns:
        (logprobs, entropy): float32 [N] each, in nats; zero where the target is IGNORE_INDEX.
    """
    pair: tuple[Tensor, Tensor] = _LogprobsAndEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, temperature
    )
    return pair


def linear_rowwise(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, function: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """`function` of the logits hidden @ weight.T + bias, a chunk of rows at a time; [N], differentiable.

    Each chunk's logits are computed again in backward, so that only one chunk's ever live. For losses that are
    not functions of a target's log-probability and the entropy alone.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V].
        function: of float32 logits [n, V] and which of the rows they are of; gives [n] or [n, ...].
    """
    dtype, rows = compute_dtype(hidden), rows_per_chunk(hidden, weight)

    def of_chunk(states: Tensor, matrix: Tensor, offsets: Tensor | None, part: slice) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return function(logits_of(states.to(dtype), matrix.to(dtype), offsets), part)

    parts = [slice(start, start + rows) for start in range(0, max(1, hidden.shape[0]), rows)]
    return torch.cat([checkpoint(of_chunk, hidden[p], weight, bias, p, use_reentrant=False) for p in parts])


def logits_in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, slice]]:
    """The float32 logits hidden @ weight.T + bias, [n, V] at a time, and which of the rows they are of."""
    dtype, rows = compute_dtype(hidden), rows_per_chunk(hidden, weight)
    h, w = hidden.to(dtype), weight.to(dtype)
    for start in range(0, max(1, len(h)), rows):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = logits_of(h[start : start + rows], w, bias)
        yield logits, slice(start, start + rows)


def bias_without(head: nn.Linear, token: int) -> Tensor:
    """The head's bias, [V], with which `token` has no probability.

    Finite, since entropy multiplies a probability of 0 with its logarithm.
    """
    shape, device = head.weight.shape[:1], head.weight.device
    excluded = torch.zeros(shape, device=device)
    excluded[token] = EXCLUDED
    return excluded if head.bias is None else head.bias.float() + excluded
