"""KTO's loss against TRL's KTOTrainer: the same answers, mismatched ones too, give the same loss and gradients.

TRL's kl is that of each micro-batch, with the answers of a micro-batch shifted by one; ours is that of the global
batch. They are one where there is one micro-batch.
"""

from pathlib import Path

import pytest
import torch

from llmtrain.algorithms import kto
from llmtrain.algorithms.answers import answer_logprobs, cached_reference
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import KTO
from tests import tiny
from tests.answers import Group, assert_same, drawn_group, laid_out, loss_and_gradients

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]'")

GROUPS = [drawn_group(2 + seed, [3 + 2 * seed], [float(seed % 2)], seed) for seed in range(4)]


@torch.no_grad()
def log_probabilities(model: Decoder, groups: list[Group]) -> list[float]:
    return answer_logprobs(model, laid_out(groups)).tolist()


@pytest.mark.parametrize("nearer", [True, False])
def test_same_loss_and_gradients(nearer: bool, tmp_path: Path) -> None:
    """With kl > 0, and with one that is cut off at 0."""
    from trl import KTOConfig, KTOTrainer

    from tests.trl_trainers import ended, per_row, text, their_loss

    groups = ended(GROUPS)
    # As TRL mismatches them: each prompt with the answer of the row before it.
    others = [group._replace(answers=groups[index - 1].answers) for index, group in enumerate(groups)]
    models = [tiny.decoder(seed=seed) for seed in (0, 1)]
    sums = [sum(log_probabilities(model, others)) for model in models]
    likelier = sums.index(max(sums))
    policy, reference = (models[likelier], models[1 - likelier]) if nearer else (models[1 - likelier], models[likelier])

    rows = [
        {"prompt": text(group.prompt), "completion": f" {text(group.answers[0])}", "label": group.levels[0] == 0}
        for group in groups
    ]
    expected = their_loss(
        KTOTrainer,
        KTOConfig,
        policy,
        rows,
        tmp_path,
        ref_model=reference,
        beta=0.5,
        desirable_weight=1.25,
        undesirable_weight=0.75,
    )

    mismatched = laid_out(others, references=log_probabilities(reference, others))
    total, num = kto.divergence(policy, [mismatched], cached_reference)
    kl = max(0.0, total.item() / num)
    assert (kl > 0) == nearer
    micro = laid_out(groups, references=log_probabilities(reference, groups), kl=kl)
    settings = KTO(kind="kto", beta=0.5, desirable_weight=1.25, undesirable_weight=0.75)
    found = loss_and_gradients(policy, kto.loss(settings, cached_reference)(policy, micro))
    assert_same(per_row(found, 4), expected)
