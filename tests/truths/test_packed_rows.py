"""However documents share rows, the loss and its gradients are those of each document alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.data.cache import TokenCorpus
from llmtrain.data.loader import evaluation_batches
from llmtrain.data.packing import PackedRows, PlannedRows, Rows
from llmtrain.data.row_plan import PlanSettings, plan_rows
from llmtrain.models.loss_head import linear_cross_entropy
from tests import tiny

T = 32


def corpus() -> TokenCorpus:
    """Documents of 2 to T tokens, about half of whose tokens are trained."""
    chooser = np.random.default_rng(0)
    ends = np.cumsum(chooser.integers(2, T, size=40))
    tokens = chooser.integers(3, tiny.VOCABULARY, ends[-1]).astype(np.uint16)
    trained = (chooser.random(ends[-1]) < 0.5).astype(np.uint8)
    return TokenCorpus(tokens, ends, 0, trained, np.arange(len(ends)))


def loss_and_gradients(rows: Rows, micro_sequences: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    decoder = tiny.decoder()
    loss = weight = 0.0
    for micro in evaluation_batches([rows], len(rows), micro_sequences, 0, 1):
        tensors, targets = micro.tensors, micro.tensors["targets"].flatten()
        nll = decoder(
            tensors["input_ids"],
            tensors["position_ids"],
            lambda hidden, head, targets=targets: linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets),
        )
        nll.backward()
        loss, weight = loss + nll.item(), weight + micro.weights["policy"]
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    return loss, weight, gradients


@pytest.mark.parametrize("micro_sequences", [1, 4])
def test_packed_rows_train_as_separate_documents(tmp_path: Path, micro_sequences: int) -> None:
    documents = corpus()
    plans = {
        packing: plan_rows(documents, "key", PlanSettings(packing, "truncate", T), tmp_path)[0]
        for packing in ("none", "best_fit")
    }
    alone = PlannedRows(documents, plans["none"], T, 2, ragged=True)
    loss, weight, gradients = loss_and_gradients(alone, 1)  # without any padding
    packed = PlannedRows(documents, plans["best_fit"], T, 2, ragged=False)
    assert len(packed) < len(alone) / 1.5
    for rows in (alone, packed):
        found, found_weight, found_gradients = loss_and_gradients(rows, micro_sequences)
        assert found_weight == weight
        assert found == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    stream = PackedRows(documents, T, 2)  # which cuts documents, so that some contexts are shorter
    assert loss_and_gradients(stream, micro_sequences)[1] == weight
