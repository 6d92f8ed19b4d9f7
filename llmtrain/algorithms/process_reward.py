"""A process reward model: whether each step of an answer is right, learnt from labelled steps.

    L = sum over labelled steps of  -log softmax(head(h))[label]

h is the hidden state at a step's last token, label 1 says that the step is right (Let's Verify Step by Step, arXiv
2305.20050, where the two are words of the vocabulary; here the head has two outputs). The weight is the number of
labelled steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain import distributed
from llmtrain.algorithms.answers import float32_logits
from llmtrain.algorithms.held_out_sums import BINS, calibration_sums
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sum


def loss(model: nn.Module, micro: MicroBatch) -> LossOutput:
    """The loss sum, and as a metric how many steps are judged as they are labelled."""
    logits, labels = step_logits(model, micro), micro.tensors["labels"]
    accuracy = Sum(_right(logits, labels).sum(), micro.weights[POLICY])
    return LossOutput({POLICY: _cross_entropy(logits, labels)}, {"accuracy": accuracy})


def step_logits(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Logits of (wrong, right) of each labelled step: float32 [N, 2]."""

    def head_logits(hidden: Tensor, head: nn.Linear) -> Tensor:
        return float32_logits(hidden.flatten(0, 1).index_select(0, micro.tensors["counted"]), head)

    logits: Tensor = model(micro.tensors["input_ids"], micro.tensors["position_ids"], head_logits)
    return logits


class HeldOutSteps:
    """Held-out figures of a process reward model.

    Args:
        batches: this rank's share, as many as every other rank's.
    """

    def __init__(self, batches: Sequence[MicroBatch]):
        self._batches = batches

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures over all ranks' steps, equal on all ranks; nothing where none are held out.

        balanced_accuracy is the mean of the accuracies on right and on wrong steps (of those there are), which a
        model that finds everything right does not reach 1 in; share_right says what it would have as accuracy.
        ece is the expected calibration error of the probability that a step is right.
        """
        sums = torch.zeros(len(_SUMS) + BINS, dtype=torch.float64)
        for micro in self._batches:
            on_device = micro.to(device)
            sums += torch.cat(_sums(step_logits(model, on_device), on_device.tensors["labels"])).cpu()
        totals = distributed.sum_scalars(sums.tolist())
        of = dict(zip(_SUMS, totals[: len(_SUMS)], strict=True))
        steps = of["right_steps"] + of["wrong_steps"]
        if not steps:
            return {}
        found = [of[f"{kind}_found"] / of[f"{kind}_steps"] for kind in ("right", "wrong") if of[f"{kind}_steps"]]
        return {
            "loss": of["loss"] / steps,
            "accuracy": (of["right_found"] + of["wrong_found"]) / steps,
            "balanced_accuracy": sum(found) / len(found),
            "share_right": of["right_steps"] / steps,
            "ece": sum(map(abs, totals[len(_SUMS) :])) / steps,
        }


_SUMS = ("loss", "right_steps", "right_found", "wrong_steps", "wrong_found")


def _sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `_SUMS` names, and the bins of the calibration, of one micro-batch; float64."""
    found = _right(logits, labels)
    named = (
        _cross_entropy(logits, labels),
        labels.sum(),
        (labels * found).sum(),
        (1 - labels).sum(),
        ((1 - labels) * found).sum(),
    )
    bins = calibration_sums(logits.softmax(1)[:, 1], labels, torch.ones_like(labels))
    return torch.stack([value.double() for value in named]), bins


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.long(), reduction="sum")


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where a step [N] is judged as it is labelled, else 0."""
    return (logits.argmax(1) == labels).float()
