"""Direct preference optimisation, and what else is a function of the same margin.

    r(y) = log p(y | x) - log p_reference(y | x)          per answer, a sum over its trained tokens
    delta = r(better) - r(worse)
    sigmoid:  L = sum over pairs of  w [ -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta) ]
    ipo:      L = sum over pairs of  w (delta - 1 / (2 beta))^2
    hinge:    L = sum over pairs of  w max(0, 1 - beta delta)

sigmoid is DPO (arXiv 2305.18290, equation 7), with e > 0 conservative DPO, whose labels are wrong with probability e;
ipo is IPO (arXiv 2310.12036, equation 17, beta its tau); hinge is SLiC's loss (arXiv 2305.10425) of DPO's margin. With
`length_normalized` r is the mean over the answer's tokens in all three. Of K ranked answers all pairs count, each of
weight w = 1 / (pairs of the group). The weight is the number of groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.algorithms.answers import (
    Reference,
    answer_lengths,
    answer_logprobs,
    of_pairs,
    pair_means,
    pair_sum,
    right,
)
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.recipe.schema import DPO


def loss(settings: DPO, reference: Reference) -> Loss:
    """The loss; its metrics are means over pairs.

    accuracy: delta > 0. margin: beta delta. reward_better, reward_worse: beta r. logprob_better, logprob_worse: of
    whole answers, in nats.
    """

    def of_batch(model: nn.Module, micro: MicroBatch) -> LossOutput:
        with torch.no_grad():
            reference_logprobs = reference(model, micro)
        logprobs = answer_logprobs(model, micro)
        ratios = logprobs - reference_logprobs
        if settings.length_normalized:
            ratios = ratios / answer_lengths(micro)
        ratio_better, ratio_worse = of_pairs(ratios, micro)
        delta = ratio_better - ratio_worse
        logprob_better, logprob_worse = of_pairs(logprobs, micro)
        metrics = pair_means(
            micro,
            accuracy=right(delta),
            margin=settings.beta * delta,
            reward_better=settings.beta * ratio_better,
            reward_worse=settings.beta * ratio_worse,
            logprob_better=logprob_better,
            logprob_worse=logprob_worse,
        )
        return LossOutput({POLICY: pair_sum(per_pair(settings, delta), micro)}, metrics)

    return of_batch


def per_pair(settings: DPO, delta: Tensor) -> Tensor:
    """The loss of each pair [P] by its difference of log-ratios."""
    beta, smoothing = settings.beta, settings.label_smoothing
    match settings.loss:
        case "sigmoid":
            return -(1 - smoothing) * F.logsigmoid(beta * delta) - smoothing * F.logsigmoid(-beta * delta)
        case "ipo":
            return (delta - 1 / (2 * beta)).square()
        case "hinge":
            return F.relu(1 - beta * delta)
