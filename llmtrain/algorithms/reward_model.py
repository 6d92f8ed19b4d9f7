"""A reward model: a score for an answer, learnt from answers that were compared.

    L = sum over pairs of  w [ -log sigmoid(s_b - s_w - m) + c (s_b + s_w)^2 ]

s_b and s_w are the scores of the better and of the worse answer, read at their last tokens, so that padding changes
nothing; m is the pair's margin (Llama 2, arXiv 2307.09288, section 3.2.2), 0 by default. With two answers this is
Bradley-Terry; with K ranked ones, all pairs that are not tied, each of weight w = 1 / (pairs of the group), from one
score an answer (InstructGPT, arXiv 2203.02155, equation 1). Scores are determined up to a constant only: c keeps
them around 0 (arXiv 2312.09244). The weight is the number of groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain import distributed
from llmtrain.algorithms.answers import answer_scores, of_pairs, pair_means, pair_sum, right
from llmtrain.algorithms.held_out_sums import BINS, calibration_sums
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.recipe.schema import RewardModel


def loss(settings: RewardModel) -> Loss:
    """The loss; its metrics are means over pairs of who is ahead (a tie is one half) and by how much."""

    def of_batch(model: nn.Module, micro: MicroBatch) -> LossOutput:
        scores = answer_scores(model, micro)
        better, worse = of_pairs(scores, micro)
        metrics = pair_means(micro, accuracy=right(better - worse), margin=better - worse)
        return LossOutput({POLICY: comparison_loss(scores, micro, settings.centering)}, metrics)

    return of_batch


def comparison_loss(scores: Tensor, micro: MicroBatch, centering: float) -> Tensor:
    """The loss of scores [A]: a scalar."""
    better, worse = of_pairs(scores, micro)
    per_pair = -F.logsigmoid(better - worse - micro.tensors["margins"])
    if centering:
        per_pair = per_pair + centering * (better + worse).square()
    return pair_sum(per_pair, micro)


class HeldOutScores:
    """Held-out figures of a reward model.

    Args:
        settings: of the loss.
        batches: this rank's share, as many as every other rank's.
    """

    def __init__(self, settings: RewardModel, batches: Sequence[MicroBatch]):
        self._settings, self._batches = settings, batches

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures over all ranks' groups, equal on all ranks; nothing where none are held out.

        loss, accuracy and margin as in training. ece: the expected calibration error of sigmoid(|difference|), the
        probability that the answer with the higher score is the better one. score_mean and score_std: over the
        answers. best_score: mean score of the answers that no other of their group is better than, which
        normalisation subtracts.
        """
        sums = torch.zeros(len(_SUMS) + BINS, dtype=torch.float64)
        for micro in self._batches:
            on_device = micro.to(device)
            scores = answer_scores(model, on_device)
            if micro.weights[POLICY]:
                sums += torch.cat(_sums(scores, on_device, self._settings.centering)).cpu()
        num_groups = sum(micro.weights[POLICY] for micro in self._batches)
        num_groups, *totals = distributed.sum_scalars([num_groups, *sums.tolist()])
        if not num_groups:
            return {}
        of = dict(zip(_SUMS, totals[: len(_SUMS)], strict=True))
        mean = of["scores"] / of["answers"]
        return {
            "loss": of["loss"] / num_groups,
            "accuracy": of["right"] / num_groups,
            "margin": of["margins"] / num_groups,
            "ece": sum(map(abs, totals[len(_SUMS) :])) / num_groups,
            "score_mean": mean,
            "score_std": max(0.0, of["squares"] / of["answers"] - mean**2) ** 0.5,
            "best_score": of["best_scores"] / of["best_answers"],
        }


_SUMS = ("loss", "right", "margins", "answers", "scores", "squares", "best_answers", "best_scores")


def _sums(scores: Tensor, micro: MicroBatch, centering: float) -> tuple[Tensor, Tensor]:
    """What `_SUMS` names, and the bins of the calibration, of one micro-batch; float64."""
    better, worse = of_pairs(scores, micro)
    difference = better - worse
    best = torch.zeros_like(scores)
    best[micro.tensors["pairs"][:, 0]] = 1
    best[micro.tensors["pairs"][:, 1]] = 0
    weights = micro.tensors["pair_weights"]
    wide = scores.double()
    named = (
        comparison_loss(scores, micro, centering),
        pair_sum(right(difference), micro),
        pair_sum(difference, micro),
        torch.ones_like(scores).sum(),
        wide.sum(),
        wide.square().sum(),
        best.sum(),
        (best * wide).sum(),
    )
    # A tie is certain of nothing: half of it is right.
    bins = calibration_sums(difference.abs().sigmoid(), right(difference), weights, low=0.5)
    return torch.stack([value.double() for value in named]), bins
