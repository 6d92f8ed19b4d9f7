"""What the losses of preference learning read of a micro-batch: the answers' log-probabilities, lengths, scores.

A micro-batch holds groups of answers to a prompt (A answers in all), behind one prompt that they share or each
behind its own; see `data/group_batches.py`. Which it is changes no figure: `visible` says what a token attends to.
One that only fills up a rank has no answers that count.

Losses over pairs are sums over the pairs (better, worse) of a group, each of weight 1 / (pairs of its group), so
that every group counts 1 (InstructGPT, arXiv 2203.02155, equation 1) and the weight is the number of groups. An
answer is computed once, however many pairs it is in.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.contracts import POLICY, MicroBatch, Sum
from llmtrain.models.attention import Visible, shared_prompts
from llmtrain.models.loss_head import linear_logprobs

Reference = Callable[[nn.Module, MicroBatch], Tensor]  # of the policy: log-probabilities [A] under the reference


def cached_reference(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Log-probabilities [A] under the reference that were computed before training."""
    return micro.tensors["reference"]


def reference_without(adapter: Callable[[], AbstractContextManager[None]]) -> Reference:
    """Log-probabilities [A] under the model while the context is open, which switches its adapter off.

    As those that are computed before training they are without dropout.
    """

    def reference(model: nn.Module, micro: MicroBatch) -> Tensor:
        training = model.training
        model.eval()
        try:
            with adapter():
                return answer_logprobs(model, micro)
        finally:
            model.train(training)

    return reference


def visible(micro: MicroBatch) -> Visible | None:
    """What each token attends to; None where that is what is before it in its document."""
    return shared_prompts(micro.tensors["segments"]) if "segments" in micro.tensors else None


def answer_logprobs(model: nn.Module, micro: MicroBatch) -> Tensor:
    """log p(answer | prompt), the sum over its trained tokens, in nats: float32 [A]."""
    tensors = micro.tensors

    def head_logprobs(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows = hidden.flatten(0, 1).index_select(0, tensors["counted"])
        return linear_logprobs(rows, head.weight, tensors["targets"], head.bias)[0]

    logprobs: Tensor = model(tensors["input_ids"], tensors["position_ids"], head_logprobs, visible(micro))
    return _of_answers(logprobs, micro)


def answer_lengths(micro: MicroBatch) -> Tensor:
    """Trained tokens of each answer: float32 [A]."""
    return _of_answers(torch.ones_like(micro.tensors["owners"], dtype=torch.float32), micro)


def answer_scores(model: nn.Module, micro: MicroBatch) -> Tensor:
    """What the scoring head says at the last token of each answer: float32 [A]."""
    tensors = micro.tensors

    def head_scores(hidden: Tensor, head: nn.Linear) -> Tensor:
        return float32_logits(hidden.flatten(0, 1).index_select(0, tensors["ends"]), head).squeeze(1)

    scores: Tensor = model(tensors["input_ids"], tensors["position_ids"], head_scores, visible(micro))
    return scores


def float32_logits(rows: Tensor, head: nn.Linear) -> Tensor:
    """rows [N, D] under a head of a few outputs, [N, outputs], multiplied in float32.

    Differences of scores matter: bfloat16 would round a score of 5 to the next of steps of 0.03.
    """
    with torch.autocast(rows.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(rows.float(), head.weight.float(), bias)


def of_pairs(values: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Values [A] of the better and of the worse answer of each pair: [P] both."""
    better, worse = micro.tensors["pairs"].unbind(1)
    return values.index_select(0, better), values.index_select(0, worse)


def pair_sum(values: Tensor, micro: MicroBatch) -> Tensor:
    """Sum of pair_weights * values [P]: every group counts 1."""
    return (micro.tensors["pair_weights"] * values).sum()


def pair_means(micro: MicroBatch, **figures: Tensor) -> dict[str, Sum]:
    """Metrics of figures [P]: means over the pairs of a group, and of these over the groups."""
    return {name: Sum(pair_sum(values.detach(), micro), micro.weights[POLICY]) for name, values in figures.items()}


def right(differences: Tensor) -> Tensor:
    """1 where the better answer is ahead of the worse one, 0 where it is behind, 1/2 where they are equal."""
    return (1 + differences.detach().sign()) / 2


def _of_answers(of_tokens: Tensor, micro: MicroBatch) -> Tensor:
    """Sums [A] of values [N] of the trained tokens."""
    sums = of_tokens.new_zeros(len(micro.tensors["ends"]))
    return sums.index_add(0, micro.tensors["owners"], of_tokens)
