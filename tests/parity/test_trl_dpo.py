"""Losses of pairs against TRL's DPOTrainer, and its experimental trainers of ORPO and CPO (SimPO).

Conventions that differ:
    ipo              TRL's log-ratios are means over an answer's tokens; that is ours with length_normalized
    label_smoothing  TRL's sigmoid ignores it; its `robust` loss, which has it, is another one (arXiv 2403.00409)
    orpo             TRL's first term is the mean over all tokens of the better rows, prompts included; ours is the
                     mean over answers of the mean over their tokens. They are one where prompts are a single token,
                     which nothing predicts, and the better answers are of one length
    simpo            TRL's is CPO's loss with simpo_gamma, and cpo_alpha = 0, or it adds a likelihood term
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.algorithms import dpo, orpo, simpo
from llmtrain.algorithms.answers import answer_logprobs, cached_reference
from llmtrain.recipe.schema import DPO, ORPO, SimPO
from tests import tiny
from tests.answers import assert_same, drawn_group, laid_out, loss_and_gradients

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]'")

GROUPS = [drawn_group(3 + seed, [4, 2 + 3 * seed], [1, 2], seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"loss_type": ["sigmoid"]}),
        ({"beta": 0.4}, {"loss_type": ["sigmoid"], "beta": 0.4}),
        ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
        ({"loss": "ipo", "length_normalized": True}, {"loss_type": ["ipo"]}),
        ({"length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
    ],
)
def test_dpo(ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    from tests.trl_trainers import ended, pair, per_row, their_loss

    model, reference, groups = tiny.decoder(), tiny.decoder(seed=1), ended(GROUPS)
    rows = [pair(group) for group in groups]
    expected = their_loss(DPOTrainer, DPOConfig, model, rows, tmp_path, ref_model=reference, **theirs)
    with torch.no_grad():
        references = answer_logprobs(reference, laid_out(groups, "shared")).tolist()
    loss = dpo.loss(DPO(kind="dpo", **ours), cached_reference)
    found = loss_and_gradients(model, loss(model, laid_out(groups, "shared", references=references)))
    assert_same(per_row(found, 3), expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta: float, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from tests.trl_trainers import ended, pair, per_row, their_loss

    model, groups = tiny.decoder(), ended(GROUPS, num_prompt=1)
    expected = their_loss(ORPOTrainer, ORPOConfig, model, [pair(group) for group in groups], tmp_path, beta=beta)
    found = loss_and_gradients(model, orpo.loss(ORPO(kind="orpo", beta=beta))(model, laid_out(groups, "shared")))
    assert_same(per_row(found, 3), expected)


def test_simpo(tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from tests.trl_trainers import ended, pair, per_row, their_loss

    model, groups = tiny.decoder(), ended(GROUPS)
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.75}
    expected = their_loss(CPOTrainer, CPOConfig, model, [pair(group) for group in groups], tmp_path, **settings)
    loss = simpo.loss(SimPO(kind="simpo", beta=2.5, gamma=0.75))
    assert_same(per_row(loss_and_gradients(model, loss(model, laid_out(groups, "shared"))), 3), expected)
