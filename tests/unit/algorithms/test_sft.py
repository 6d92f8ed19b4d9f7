"""The losses of fine-tuning against their formulas on whole logits; the masks are the data's tests."""

from typing import cast

import pytest
import torch
from torch import Tensor

from llmtrain.algorithms.sft import LOSSES
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.models.decoder import Decoder
from llmtrain.models.loss_head import IGNORE_INDEX
from tests import tiny

IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def micro() -> MicroBatch:
    targets = IDS.roll(-1, 1).clone()
    targets[:, -1] = IGNORE_INDEX
    targets[0, :4] = IGNORE_INDEX  # what the user said
    positions = torch.arange(9).expand(2, 9)
    counted = (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]
    tensors = {"input_ids": IDS, "targets": targets, "position_ids": positions, "counted": counted}
    return MicroBatch(tensors, {POLICY: float(len(counted))}, 18)


def by_formula(decoder: Decoder, loss: str) -> Tensor:
    batch = micro()
    targets = batch.tensors["targets"]
    logp = decoder.hf(input_ids=IDS).logits.log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
    per_token = -logp if loss == "nll" else -logp.exp().detach() * logp
    return per_token[targets != IGNORE_INDEX].sum()


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_loss_and_gradient(loss: str) -> None:
    decoder = tiny.decoder()
    by_formula(decoder, loss).backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    output = LOSSES[loss](decoder, micro())
    torch.testing.assert_close(output.sums[POLICY], by_formula(decoder, loss), rtol=1e-5, atol=0)
    output.sums[POLICY].backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_dft_reports_the_plain_loss_beside_its_own() -> None:
    decoder = tiny.decoder()
    metric = LOSSES["dft"](decoder, micro()).metrics["nll"]
    torch.testing.assert_close(cast(Tensor, metric.value), by_formula(decoder, "nll").detach(), rtol=1e-5, atol=0)
    assert metric.weight == micro().weights[POLICY]
