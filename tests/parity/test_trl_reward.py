"""The reward loss against TRL's RewardTrainer: the same pairs give the same loss and gradients.

TRL computes each answer in a padded row of its own behind the prompt; ours share it. Its mean is over pairs, ours
over groups, which are pairs here. It has no K-wise loss.
"""

from pathlib import Path

import pytest
import torch

from llmtrain.algorithms import reward_model
from llmtrain.recipe.schema import RewardModel
from tests.answers import assert_same, drawn_group, laid_out, loss_and_gradients, scorer

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]'")

MARGINS = (0.5, 0.0, 1.25)


@pytest.mark.parametrize("margins", [(0.0, 0.0, 0.0), MARGINS])
@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_same_loss_and_gradients(centering: float, margins: tuple[float, ...], tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    from tests.trl_trainers import per_row, their_loss

    groups = [drawn_group(3 + seed, [5, 2 + 3 * seed], [1, 2], seed, margin) for seed, margin in enumerate(margins)]
    model = scorer()
    with torch.no_grad():
        model.hf.score.weight.mul_(20)  # scores as far apart as those of a trained model
    rows = [
        {
            "chosen_ids": group.prompt + group.answers[0],
            "rejected_ids": group.prompt + group.answers[1],
            "margin": group.margin,
        }
        for group in groups
    ]
    theirs = their_loss(
        RewardTrainer, RewardConfig, model, rows, tmp_path, center_rewards_coefficient=centering or None
    )
    loss = reward_model.loss(RewardModel(kind="reward_model", centering=centering))
    assert_same(per_row(loss_and_gradients(model, loss(model, laid_out(groups, "shared"))), 3), theirs)
