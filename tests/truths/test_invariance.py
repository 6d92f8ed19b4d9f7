"""The global batch alone decides what is learnt: not how it is split over micro-batches and ranks."""

import pytest

from llmtrain.observe.metrics import read_metrics
from tests.runs import assert_same, final_weights, train_apart, train_here, write_recipe

# float32 sums in another order, after six AdamW steps of size 1e-2 each
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
FIGURES = {"loss", "grad_norm", "eval_loss", "eval_bits_per_byte"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One rank, the whole batch in one forward."""
    directory = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(directory)
    return recipe, train_here(recipe)


def assert_same_run(run, whole):
    assert_same(final_weights(run), final_weights(whole), **TOLERANCE)
    for ours, theirs in zip(read_metrics(run / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl"), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours.keys() == theirs.keys()
        for figure in FIGURES & ours.keys():
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-5), figure


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_changes_nothing(whole, micro, tmp_path):
    recipe, reference = whole
    assert_same_run(train_here(recipe, f"output_dir={tmp_path}", f"batch.micro_sequences={micro}"), reference)


@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_two_ddp_ranks_change_nothing(whole, micro, tmp_path):
    recipe, reference = whole
    overrides = (f"output_dir={tmp_path}", f"batch.micro_sequences={micro}", "engine.kind=ddp")
    assert_same_run(train_apart(recipe, *overrides, ranks=2), reference)


def test_activation_checkpointing_changes_nothing(whole, tmp_path):
    recipe, reference = whole
    assert_same_run(train_here(recipe, f"output_dir={tmp_path}", "engine.activation_checkpointing=full"), reference)


@pytest.mark.slow
def test_compiled_layers_change_nothing(whole, tmp_path):
    recipe, reference = whole
    assert_same_run(train_here(recipe, f"output_dir={tmp_path}", "engine.compile=true"), reference)
