"""Autoregressive language modelling, of pretraining or continued pretraining.

    L = sum over counted positions i of  -log p(x_{i+1} | x_{<=i})

Counted is every token but a document's first: rows are packed with several documents, positions
restart at each, and attention stays inside. The weight is the number of counted tokens. The
logits are never whole (`models/loss_head.py`).
"""

from torch import nn

from llmtrain.algorithms.texts import nll_sum
from llmtrain.contracts import POLICY, LossOutput, MicroBatch


def nll(model: nn.Module, micro: MicroBatch) -> LossOutput:
    return LossOutput({POLICY: nll_sum(model, micro)})
