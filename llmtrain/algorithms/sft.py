"""Supervised fine-tuning: what an assistant says is predicted, what it is told is only read.

    nll:  L = sum over trained tokens of  -log p(x_{i+1} | x_{<=i})
    dft:  L = sum over trained tokens of  -sg(p(x_{i+1} | x_{<=i})) log p(x_{i+1} | x_{<=i})

Trained are the tokens of the assistant's turns with the token that ends each (`data/chat.py`); sg
stops the gradient. Dynamic fine-tuning (DFT, arXiv 2508.05629) cancels the factor 1 / p that
makes the plain loss a policy gradient whose reward grows without bound for tokens that the model
finds improbable. The weight is the number of trained tokens; held-out figures are of the plain loss.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtrain.algorithms.texts import HeldOut, TextSamples, counted, nll_sum, refuse_other_data
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sample, Sum
from llmtrain.data.loader import Loader
from llmtrain.models.loss_head import linear_logprobs


class SFT:
    """Fine-tuning on conversations, prompts with completions, or texts.

    Args:
        loss: which one.
        loader: gives this rank's micro-batches of any step.
        held_out: rows to measure on.
        samples: answers to look at.
        data_fingerprint: as in `CausalLM`.
    """

    def __init__(
        self,
        loss: Literal["nll", "dft"],
        loader: Loader,
        held_out: HeldOut,
        samples: TextSamples,
        data_fingerprint: Mapping[str, str],
    ):
        self._kind, self._loader, self._held_out, self._samples = loss, loader, held_out, samples
        self._data_fingerprint = data_fingerprint

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        step = first_step
        while True:
            yield self._loader.micro_batches(step)
            step += 1

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        if self._kind == "nll":
            return LossOutput({POLICY: nll_sum(models[POLICY], micro)})
        logprobs = _logprobs(models[POLICY], micro)
        probabilities = logprobs.detach().exp()
        metrics = {"nll": Sum(-logprobs.detach().sum(), micro.weights[POLICY])}
        return LossOutput({POLICY: -(probabilities * logprobs).sum()}, metrics)

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        return self._held_out.figures(models[POLICY], device)

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        return self._samples.drawn(models[POLICY], device)

    def state_dict(self) -> dict[str, Any]:
        return {"data": dict(self._data_fingerprint)}  # batches depend on (seed, step) and the rows only

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        refuse_other_data(self._data_fingerprint, state["data"])


def _logprobs(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Log-probability of each target that counts, float32 [N]."""

    def head_logprobs(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows, targets = counted(hidden, micro)
        logprobs, _ = linear_logprobs(rows, head.weight, targets, head.bias)
        return logprobs

    logprobs: Tensor = model(micro.tensors["input_ids"], micro.tensors["position_ids"], head_logprobs)
    return logprobs
