"""Autoregressive language modelling.

    L = sum over counted positions i of  -log p(x_{i+1} | x_{<=i})

Counted is every token but a document's first: rows are packed with several documents, positions
restart at each, and attention stays inside. The weight is the number of counted tokens. The
logits are never whole (`models/loss_head.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmtrain.algorithms.texts import HeldOut, TextSamples, nll_sum, refuse_other_data
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sample
from llmtrain.data.loader import Loader


class CausalLM:
    """Next-token prediction on packed rows, of pretraining or continued pretraining.

    Args:
        loader: gives this rank's micro-batches of any step.
        held_out: rows to measure on.
        samples: texts to look at.
        data_fingerprint: hashes of the training and held-out rows, by key of the recipe; a resumed run must
            find the same, or neither its batches nor its figures would go on from what they were.
    """

    def __init__(self, loader: Loader, held_out: HeldOut, samples: TextSamples, data_fingerprint: Mapping[str, str]):
        self._loader, self._held_out, self._samples = loader, held_out, samples
        self._data_fingerprint = data_fingerprint

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        step = first_step
        while True:
            yield self._loader.micro_batches(step)
            step += 1

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        return LossOutput({POLICY: nll_sum(models[POLICY], micro)})

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        return self._held_out.figures(models[POLICY], device)

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        return self._samples.drawn(models[POLICY], device)

    def state_dict(self) -> dict[str, Any]:
        return {"data": dict(self._data_fingerprint)}  # batches depend on (seed, step) and the rows only

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        refuse_other_data(self._data_fingerprint, state["data"])
