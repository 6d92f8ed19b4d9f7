"""Supervised fine-tuning: what an assistant says is predicted, what it is told is only read.

    nll:  L = sum over trained tokens of  -log p(x_{i+1} | x_{<=i})
    dft:  L = sum over trained tokens of  -sg(p(x_{i+1} | x_{<=i})) log p(x_{i+1} | x_{<=i})

Trained are the tokens of the assistant's turns with the token that ends each (`data/chat.py`), so that nll
is the loss of `causal_lm.py` with fewer targets; sg stops the gradient. Dynamic fine-tuning (DFT, arXiv
2508.05629) cancels the factor 1 / p that makes the plain loss a policy gradient whose reward grows without
bound for tokens that the model finds improbable. The weight is the number of trained tokens; held-out
figures are of the plain loss.
"""

from torch import Tensor, nn

from llmtrain.algorithms import causal_lm
from llmtrain.algorithms.texts import counted
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sum
from llmtrain.models.loss_head import linear_logprobs


def dft(model: nn.Module, micro: MicroBatch) -> LossOutput:
    """DFT's loss sum, with the plain one beside it as the metric nll."""

    def head_logprobs(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows, targets = counted(hidden, micro)
        return linear_logprobs(rows, head.weight, targets, head.bias)[0]

    logprobs: Tensor = model(micro.tensors["input_ids"], micro.tensors["position_ids"], head_logprobs)
    probabilities = logprobs.detach().exp()
    plain = Sum(-logprobs.detach().sum(), micro.weights[POLICY])
    return LossOutput({POLICY: -(probabilities * logprobs).sum()}, {"nll": plain})


LOSSES = {"nll": causal_lm.nll, "dft": dft}
