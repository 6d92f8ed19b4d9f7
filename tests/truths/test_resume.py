"""k steps, resume, N - k steps equal N steps, bit for bit."""

import shutil

import pytest

from llmtrain.errors import InputError, TrainingError
from llmtrain.observe.metrics import read_metrics
from tests.runs import assert_same, cut_after, final_weights, train_apart, train_here, training_state, write_recipe

SETTINGS = {
    "plain": {},
    "accumulated": {"batch": {"sequences": 8, "micro_sequences": 2}},
    "averaged, bf16, dropout": {
        "precision": "bf16",
        "ema": {"decay": 0.9},
        "model": {
            "kind": "config",
            "architecture": "llama",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "attention_dropout": 0.1,
            },
        },
    },
    "several epochs": {"batch": {"sequences": 64, "micro_sequences": 64}, "steps": 12},
}


def without_clocks(record):
    clocks = ("time", "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    return {key: value for key, value in record.items() if key not in clocks}


@pytest.mark.parametrize("settings", SETTINGS)
def test_resumed_equals_undisturbed_bit_for_bit(settings, tmp_path):
    recipe = write_recipe(tmp_path, **SETTINGS[settings])
    whole = train_here(recipe)
    cut_after(whole, 3, tmp_path / "cut")
    resumed = train_here(recipe, f"output_dir={tmp_path / 'cut'}")
    steps = SETTINGS[settings].get("steps", 6)
    assert_same(training_state(resumed, steps), training_state(whole, steps))
    assert_same(final_weights(resumed), final_weights(whole))
    a, b = (list(map(without_clocks, read_metrics(run / "metrics.jsonl"))) for run in (resumed, whole))
    assert a == b


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    recipe = write_recipe(tmp_path, batch={"sequences": 8, "micro_sequences": 2})
    whole = train_apart(recipe, ranks=2)
    cut_after(whole, 3, tmp_path / "cut")
    resumed = train_apart(recipe, f"output_dir={tmp_path / 'cut'}", ranks=2)
    assert_same(training_state(resumed, 6), training_state(whole, 6))


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path):
    """From two ranks to one: no longer the same bits, still the same run."""
    recipe = write_recipe(tmp_path)
    two = train_apart(recipe, "batch.micro_sequences=4", ranks=2)
    cut_after(two, 3, tmp_path / "cut")
    one = train_here(recipe, f"output_dir={tmp_path / 'cut'}")
    assert_same(final_weights(one), final_weights(two), rtol=1e-5, atol=2e-6)


def test_a_finished_run_is_left_alone(tmp_path):
    recipe = write_recipe(tmp_path)
    run = train_here(recipe)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    train_here(recipe)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_changed_data_are_refused(tmp_path):
    """The recipe is the same and the text is not: going on would be another run in silence."""
    recipe = write_recipe(tmp_path)
    whole = train_here(recipe)
    cut_after(whole, 3, tmp_path / "cut")
    with (tmp_path / "corpus.txt").open("a") as corpus:
        corpus.write("one more line that was not there\n")
    with pytest.raises(InputError, match="data.*changed"):
        train_here(recipe, f"output_dir={tmp_path / 'cut'}")


def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_again_in_silence(tmp_path):
    recipe = write_recipe(tmp_path)
    run = train_here(recipe)
    shutil.rmtree(run / "final")
    for state in run.glob("checkpoints/*/state-rank-00000.safetensors"):
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="none of them is whole"):
        train_here(recipe)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_diverged_run_fails_and_exports_nothing(tmp_path):
    recipe = write_recipe(tmp_path, optimizer={"lr": 1e38})
    with pytest.raises(TrainingError, match="not finite after the last step"):
        train_here(recipe)
    assert not (tmp_path / "runs" / "tiny" / "final").exists()
