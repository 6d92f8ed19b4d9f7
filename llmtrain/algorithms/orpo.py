"""ORPO: the better answer is learnt, and its odds against the worse one are raised, without a reference.

    m(y) = log p(y | x) / |y|                             mean over the answer's trained tokens
    log odds(y) = m - log(1 - exp(m))
    L = sum over pairs of  w [ -m(better) - beta log sigmoid(log odds(better) - log odds(worse)) ]

arXiv 2403.07691, equations 3, 4, 6 and 7; beta is its lambda. The first term is the plain loss of the better answer,
the mean over its own tokens: prompts are not trained, and every answer counts 1 whatever its length (TRL's is the
mean over all tokens of the batch, prompts included). Of K ranked answers all pairs count, each of weight
w = 1 / (pairs of the group). The weight is the number of groups.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.algorithms.answers import answer_lengths, answer_logprobs, of_pairs, pair_means, pair_sum, right
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.recipe.schema import ORPO


def loss(settings: ORPO) -> Loss:
    """The loss; its metrics are means over pairs.

    nll: the first term. log_odds_ratio: what log sigmoid is taken of. accuracy: it is > 0. logprob_better,
    logprob_worse: means over an answer's tokens, in nats.
    """

    def of_batch(model: nn.Module, micro: MicroBatch) -> LossOutput:
        better, worse = of_pairs(answer_logprobs(model, micro) / answer_lengths(micro), micro)
        log_odds_ratio = log_odds(better) - log_odds(worse)
        per_pair = -better - settings.beta * F.logsigmoid(log_odds_ratio)
        metrics = pair_means(
            micro,
            nll=-better,
            log_odds_ratio=log_odds_ratio,
            accuracy=right(log_odds_ratio),
            logprob_better=better,
            logprob_worse=worse,
        )
        return LossOutput({POLICY: pair_sum(per_pair, micro)}, metrics)

    return of_batch


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0; finite, and with a finite gradient, at p = 1 too."""
    # A probability that float32 rounds to 1 has the odds of the one before it, and nothing more to learn.
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    # 1 - p loses its digits near p = 1, where expm1 has them; far from it they are in p, and log1p keeps them.
    near = logprobs > -math.log(2)
    log1mexp_near = torch.log(-torch.expm1(torch.where(near, logprobs, -1.0)))
    log1mexp_far = torch.log1p(-torch.exp(torch.where(near, -1.0, logprobs)))
    return logprobs - torch.where(near, log1mexp_near, log1mexp_far)
