"""The loss of labelled steps against its formula, on logits of transformers' own forward."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmtrain.algorithms import process_reward
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data import group_rows as data
from llmtrain.data.group_batches import StepCollator
from tests.answers import PAD, assert_same, drawn_steps, loss_and_gradients, scorer, steps_laid_out, without_weight

ANSWERS = [drawn_steps(9, {3: 1.0, 8: 0.0}, seed=0), drawn_steps(6, {2: 1.0, 4: 1.0, 5: 0.0}, seed=1)]


def test_loss_and_gradient() -> None:
    """Of answers packed into one row, and of each padded in a row of its own."""
    model = scorer(num_labels=2).eval()  # transformers has a dropout before the head in training
    by_formula = torch.zeros(())
    for ids, labels in ANSWERS:
        logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for place, label in labels.items():
            by_formula = by_formula - logits[place].log_softmax(0)[int(label)]
    by_formula.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for packed in (True, False):
        found = loss_and_gradients(model, process_reward.loss(model, steps_laid_out(ANSWERS, packed)))
        assert_same(found, (by_formula.detach(), expected))


def test_accuracy_is_the_share_of_steps_that_are_judged_as_they_are_labelled() -> None:
    model = scorer(num_labels=2)
    micro = steps_laid_out(ANSWERS)
    probabilities = process_reward.step_logits(model, micro).softmax(1)[:, 1]
    value, weight = process_reward.loss(model, micro).metrics["accuracy"]
    assert float(value) == ((probabilities > 0.5) == micro.tensors["labels"].bool()).sum()
    assert weight == micro.weights[POLICY] == 5


def test_what_the_model_reads_behind_a_step_does_not_matter() -> None:
    model = scorer(num_labels=2)
    ids, labels = ANSWERS[0]
    changed = [*ids[:4], *reversed(ids[4:])]
    before, after = (process_reward.step_logits(model, steps_laid_out([(tokens, labels)])) for tokens in (ids, changed))
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-6


def test_how_answers_are_cut_into_micro_batches_does_not_matter() -> None:
    model = scorer(num_labels=2)
    whole = loss_and_gradients(model, process_reward.loss(model, steps_laid_out(ANSWERS)))
    micros: list[MicroBatch] = [steps_laid_out([answer]) for answer in ANSWERS]
    parts = [
        loss_and_gradients(model, process_reward.loss(model, micro)) for micro in (*micros, without_weight(micros[0]))
    ]
    gradients = {name: sum((part[1][name] for part in parts), torch.zeros(())) for name in whole[1]}
    assert_same((sum((part[0] for part in parts), torch.zeros(())), gradients), whole)


def test_an_untrained_head_of_zeros_costs_log_2_a_step() -> None:
    model = scorer(num_labels=2)
    for parameter in model.hf.score.parameters():
        torch.nn.init.zeros_(parameter)
    output = process_reward.loss(model, steps_laid_out(ANSWERS))
    torch.testing.assert_close(output.sums[POLICY], F.softplus(torch.zeros(5)).sum())


@pytest.mark.parametrize("packed", [True, False])
def test_the_datas_micro_batches_are_those_laid_out_by_hand(packed: bool) -> None:
    groups = []
    for ids, labels in ANSWERS:
        judged = np.isin(np.arange(len(ids)), list(labels))
        values = np.array([[label, 0] for label in labels.values()], np.float32)
        groups.append(data.Group(np.array([], np.int64), [np.array(ids)], [judged], values, 0))
    rows = [groups] if packed else [[group] for group in groups]
    micro = StepCollator(length=64, pad_id=PAD).collate(rows, np.arange(len(rows)), ragged=True)
    expected = steps_laid_out(ANSWERS, packed)
    for name in ("input_ids", "counted", "labels"):
        torch.testing.assert_close(micro.tensors[name], expected.tensors[name], rtol=0, atol=0, msg=name)
    read = expected.tensors["input_ids"] != PAD
    assert torch.equal(micro.tensors["position_ids"][read], expected.tensors["position_ids"][read])
    assert (micro.weights, micro.num_tokens) == (expected.weights, expected.num_tokens)
