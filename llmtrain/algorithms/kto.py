"""KTO: answers that are good or bad, each by itself.

    r(y) = log p(y | x) - log p_reference(y | x)
    good:  l = w_good (1 - sigmoid(beta (r - kl)))
    bad:   l = w_bad  (1 - sigmoid(beta (kl - r)))
    kl = max(0, mean of r(y') over prompts with answers y' to other prompts)

Kahneman-Tversky optimisation (arXiv 2402.01306, equation 7). kl estimates how far the policy is from the
reference; no gradient flows through it, and it is one number for the global batch, so that the loss does not depend
on how that was cut up. The weight is the number of answers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llmtrain.algorithms.answers import Reference, answer_logprobs
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sum
from llmtrain.recipe.schema import KTO


def loss(settings: KTO, reference: Reference) -> Loss:
    """The loss, where each micro-batch holds the scalar tensor `kl`.

    Metrics: reward_good, reward_bad (means of beta r), accuracy (answers on their side of kl, one half on it), kl.
    """

    def of_batch(model: nn.Module, micro: MicroBatch) -> LossOutput:
        levels, kl = micro.tensors["levels"], micro.tensors["kl"]
        num_bad = levels.sum().item()  # waits for the device, which has nothing of this micro-batch to do yet
        with torch.no_grad():
            reference_logprobs = reference(model, micro)
        ratios = answer_logprobs(model, micro) - reference_logprobs
        gains = settings.beta * torch.where(levels == 0, ratios - kl, kl - ratios)
        weights = torch.where(levels == 0, settings.desirable_weight, settings.undesirable_weight)
        rewards = settings.beta * ratios.detach()
        num = micro.weights[POLICY]
        metrics = {
            "reward_good": Sum((rewards * (1 - levels)).sum(), num - num_bad),
            "reward_bad": Sum((rewards * levels).sum(), num_bad),
            "accuracy": Sum(((1 + gains.detach().sign()) / 2).sum(), num),
            "kl": Sum(kl * num, num),
        }
        return LossOutput({POLICY: (weights * (-gains).sigmoid()).sum()}, metrics)  # 1 - sigmoid(x) = sigmoid(-x)

    return of_batch


@torch.no_grad()
def divergence(model: nn.Module, mismatched: Iterable[MicroBatch], reference: Reference) -> tuple[Tensor, float]:
    """(sum of r, number of answers) over micro-batches, on the model's device, of answers to other prompts."""
    total, num = torch.zeros(()), 0.0
    for micro in mismatched:
        ratios = answer_logprobs(model, micro) - reference(model, micro)
        total, num = total + ratios.sum().double(), num + micro.weights[POLICY]
    return total, num
