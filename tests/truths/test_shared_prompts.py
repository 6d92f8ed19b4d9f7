"""Answers that share a prompt are what they are behind a prompt of their own, in scores, losses and gradients."""

from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.algorithms import dpo, orpo, reward_model
from llmtrain.algorithms.answers import answer_logprobs, answer_scores, cached_reference
from llmtrain.algorithms.texts import Loss
from llmtrain.data import group_rows as data
from llmtrain.data.group_batches import GroupCollator
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import DPO, ORPO, RewardModel
from tests import tiny
from tests.answers import (
    LAYOUTS,
    PAD,
    Group,
    Layout,
    assert_same,
    drawn_group,
    laid_out,
    loss_and_gradients,
    scorer,
    without_weight,
)

GROUPS = [
    drawn_group(6, [5, 3], [1, 2], seed=0, margin=0.5),
    drawn_group(3, [1, 8, 4], [1, 2, 3], seed=1),
    drawn_group(9, [2, 2], [1, 2], seed=2),
]
REFERENCES = [-20.0 - number for number in range(7)]
ARCHITECTURES = {
    "llama": {},
    "qwen3": {**tiny.LLAMA, "head_dim": 8},
    "mistral": {**tiny.LLAMA, "sliding_window": None},
}
LOSSES: dict[str, Loss] = {
    "dpo": dpo.loss(DPO(kind="dpo"), cached_reference),
    "orpo": orpo.loss(ORPO(kind="orpo")),
    "reward_model": reward_model.loss(RewardModel(kind="reward_model")),
}

of_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model_for(name: str, architecture: str, **fields: Any) -> Decoder:
    """With weights of a size at which attention is far from even."""
    fields = ARCHITECTURES[architecture] | fields
    model = scorer(architecture, **fields) if name == "reward_model" else tiny.decoder(architecture, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@of_architecture
@torch.no_grad()
def test_scores_and_log_probabilities(architecture: str) -> None:
    for name, function in (("reward_model", answer_scores), ("dpo", answer_logprobs)):
        model = model_for(name, architecture)
        shared, separate, padded = (function(model, laid_out(GROUPS, layout)) for layout in LAYOUTS)
        torch.testing.assert_close(shared, padded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(separate, padded, rtol=1e-5, atol=1e-5)


@of_architecture
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name: str, architecture: str) -> None:
    model = model_for(name, architecture)
    shared, separate, padded = (
        loss_and_gradients(model, LOSSES[name](model, laid_out(GROUPS, layout, references=REFERENCES)))
        for layout in LAYOUTS
    )
    assert_same(shared, padded)
    assert_same(separate, padded)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_kernels(kernel: str) -> None:
    model = model_for("orpo", "llama", attn_implementation=kernel)
    shared = loss_and_gradients(model, LOSSES["orpo"](model, laid_out(GROUPS, "shared")))
    assert_same(shared, loss_and_gradients(model, LOSSES["orpo"](model, laid_out(GROUPS, "padded"))))


@torch.no_grad()
def test_an_answer_does_not_see_another() -> None:
    """Another token in one answer changes the log-probability of that answer only."""
    model = model_for("dpo", "llama")
    changed = [Group(group.prompt, [[*group.answers[0][:-1], 3], *group.answers[1:]], group.levels) for group in GROUPS]
    before, after = (answer_logprobs(model, laid_out(groups, "shared", 3)) for groups in (GROUPS, changed))
    assert [index for index in range(7) if before[index] != after[index]] == [0, 2, 5]


def test_rows_of_padding_are_no_nan() -> None:
    """A short row beside a long one."""
    model = model_for("dpo", "llama")
    groups = [drawn_group(20, [9, 9], [1, 2]), drawn_group(1, [1, 1], [1, 2])]
    micro = laid_out(groups, "shared", groups_a_row=1, references=[-1.0] * 4)
    _, gradients = loss_and_gradients(model, LOSSES["dpo"](model, micro))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_datas_micro_batches_are_those_laid_out_by_hand(layout: Layout) -> None:
    groups = [
        data.Group(
            np.array(group.prompt),
            [np.array(answer) for answer in group.answers],
            [np.ones(len(answer), bool) for answer in group.answers],
            np.array([[level, -level * group.margin] for level in group.levels], np.float32),
            first,
        )
        for group, first in zip(GROUPS, (0, 2, 5), strict=True)
    ]
    collator = GroupCollator(layout, length=64, pad_id=PAD)
    micro = collator.collate([groups[:2], groups[2:]], np.arange(2), ragged=True)
    expected = laid_out(GROUPS, layout)
    assert micro.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        if name != "position_ids":  # of padding theirs are others
            torch.testing.assert_close(micro.tensors[name], tensor, rtol=0, atol=0, msg=name)
    read = expected.tensors["input_ids"] != PAD
    assert torch.equal(micro.tensors["position_ids"][read], expected.tensors["position_ids"][read])
    assert (micro.weights, micro.num_tokens) == (expected.weights, expected.num_tokens)
    empty = collator.without_weight(micro)
    assert {name: len(tensor) for name, tensor in empty.tensors.items()} == {
        name: len(tensor) for name, tensor in without_weight(expected).tensors.items()
    }
