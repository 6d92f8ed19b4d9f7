"""How DPO and KTO ask for the reference; the losses are proven in tests/truths."""

import pytest
import torch
from torch import Tensor, nn

from llmtrain.algorithms import dpo, kto
from llmtrain.algorithms.answers import answer_logprobs
from llmtrain.algorithms.texts import Loss
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.recipe.schema import DPO, KTO
from tests import tiny
from tests.answers import drawn_group, laid_out

GROUPS = [drawn_group(3, [4, 2], [0, 1])]
REFERENCE = tiny.decoder(seed=1)


def live(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Another model's log-probabilities, computed in each step."""
    assert not torch.is_grad_enabled()
    return answer_logprobs(REFERENCE, micro)


@pytest.mark.parametrize("loss", [dpo.loss(DPO(kind="dpo"), live), kto.loss(KTO(kind="kto"), live)])
def test_the_reference_gets_no_gradient(loss: Loss) -> None:
    model = tiny.decoder()
    loss(model, laid_out(GROUPS, kl=0.1)).sums[POLICY].backward()
    assert all(parameter.grad is None for parameter in REFERENCE.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_a_live_reference_gives_what_a_cached_one_does() -> None:
    with torch.no_grad():
        references = answer_logprobs(REFERENCE, laid_out(GROUPS)).tolist()
    model, settings = tiny.decoder(), DPO(kind="dpo")
    cached = dpo.loss(settings, lambda _, micro: micro.tensors["reference"])
    one = cached(model, laid_out(GROUPS, references=references))
    other = dpo.loss(settings, live)(model, laid_out(GROUPS))
    torch.testing.assert_close(one.sums[POLICY], other.sums[POLICY])


def test_a_hinge_that_is_passed_has_no_gradient() -> None:
    settings = DPO(kind="dpo", loss="hinge", beta=0.5)
    assert dpo.per_pair(settings, torch.tensor([2.0, 3.0, 1.0])).tolist() == [0, 0, 0.5]


def test_ipo_is_least_at_its_target() -> None:
    settings = DPO(kind="dpo", loss="ipo", beta=0.25)
    assert dpo.per_pair(settings, torch.tensor([2.0, 0.0, 4.0])).tolist() == [0, 4, 4]
