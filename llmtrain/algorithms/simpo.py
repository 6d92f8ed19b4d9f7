"""SimPO: the better answer's mean log-probability is raised above the worse one's by a margin, without a reference.

    m(y) = log p(y | x) / |y|                             mean over the answer's trained tokens
    L = sum over pairs of  -w log sigmoid(beta (m(better) - m(worse)) - gamma)

arXiv 2405.14734, equation 6. gamma is not multiplied by beta: a ratio gamma / beta, as some recipes have it, must be.
Of K ranked answers all pairs count, each of weight w = 1 / (pairs of the group). The weight is the number of groups.
"""

from torch import nn
from torch.nn import functional as F

from llmtrain.algorithms.answers import answer_lengths, answer_logprobs, of_pairs, pair_means, pair_sum, right
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.recipe.schema import SimPO


def loss(settings: SimPO) -> Loss:
    """The loss; its metrics are means over pairs.

    accuracy: the better answer is ahead, by whatever margin. margin: beta (m(better) - m(worse)). logprob_better,
    logprob_worse: m, in nats.
    """

    def of_batch(model: nn.Module, micro: MicroBatch) -> LossOutput:
        better, worse = of_pairs(answer_logprobs(model, micro) / answer_lengths(micro), micro)
        margin = settings.beta * (better - worse)
        per_pair = -F.logsigmoid(margin - settings.gamma)
        metrics = pair_means(micro, accuracy=right(margin), margin=margin, logprob_better=better, logprob_worse=worse)
        return LossOutput({POLICY: pair_sum(per_pair, micro)}, metrics)

    return of_batch
