"""Every kind of mistake, with the whole line that a person reads."""
# ruff: noqa: E501  (a message is one line)

from pathlib import Path

import pytest

from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.problems import RecipeError
from tests.unit.recipe.minimal import MINIMAL, Write

TOP = (
    "name, description, output_dir, seed, device, precision, sequence_length, steps, epochs, batch, model, adapter, tokenizer, "
    "data, algorithm, optimizer, schedule, engine, ema, evaluation, early_stopping, samples, checkpoint, watchdog, logging"
)


def mistakes(file: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return [str(problem).replace(f"{file}:", "") for problem in caught.value.problems]


CASES = [
    # unknown keys
    ("steps: 100", "steps: 100\nstepz: 1", f"4: stepz: unknown key 'stepz'; did you mean 'steps'?; allowed: {TOP}"),
    ("steps: 100", "steps: 100\nlr: 1", f"4: lr: unknown key 'lr'; there is optimizer.lr; allowed: {TOP}"),
    ("steps: 100", "steps: 100\nzzz: 1", f"4: zzz: unknown key 'zzz'; allowed: {TOP}"),
    (
        "{lr: 1e-3}",
        "{lr: 1e-3, wieght_decay: 0}",
        "14: optimizer.wieght_decay: unknown key 'wieght_decay' for kind adamw; did you mean 'weight_decay'?; allowed: kind, lr, groups, betas, eps, weight_decay, clip_norm, max_skipped_steps",
    ),
    (
        "kind: cosine,",
        "kind: constant, min_ratio: 0.1,",
        "15: schedule.min_ratio: unknown key 'min_ratio' for kind constant; kinds linear, cosine, wsd would take it; allowed: kind, warmup_steps",
    ),
    (
        "paths: [a.txt]",
        "paths: [a.txt], field: b",
        "12: data.train.0.field: unknown key 'field' for kind text; kinds jsonl, parquet, huggingface would take it; allowed: kind, weight, paths, document",
    ),
    # missing keys
    ("name: minimal\n", "", "1: missing key 'name' (Name of the run; its directory is output_dir/name)"),
    ("batch: {sequences: 8}\n", "", "1: missing key 'batch' (The global batch of one optimizer step)"),
    (
        "schedule: {kind: cosine, warmup_steps: 5}\n",
        "",
        "1: missing key 'schedule' (kind constant, linear, cosine, wsd)",
    ),
    (
        "{lr: 1e-3}",
        "{eps: 1e-8}",
        "14: optimizer has no lr, and only fine-tuning and learning from preferences have a default",
    ),
    ("kind: cosine", "kind: wsd", "15: schedule: missing key 'decay_steps' (Steps of the final decay)"),
    ("{kind: text, ", "{", "12: data.train.0: missing key 'kind'; allowed: text, jsonl, parquet, python, huggingface"),
    ("  kind: config\n", "", "5: model: missing key 'kind'; allowed: config, pretrained, gguf"),
    # values of several types
    *(
        (
            "{kind: causal_lm}",
            f"{{kind: block_diffusion, block_size: 4, clip: {given}}}",
            f"13: algorithm.clip{said}",
        )
        for given, said in (
            ("[0.3, 1.3]", ".1: must be at most 1, given 1.3"),
            ("serch", ": the text 'serch' is not allowed; did you mean 'search'?; allowed: search, or a list"),
            ("0.5", ": 0.5 is not allowed; allowed: search, or a list"),
        )
    ),
    (
        "algorithm:",
        "adapter: {kind: lora, target_modules: 5}\nalgorithm:",
        "13: adapter.target_modules: expected text or a list, given 5",
    ),
    # kinds and choices
    (
        "kind: cosine",
        "kind: cosin",
        "15: schedule.kind: the text 'cosin' is not allowed; did you mean 'cosine'?; allowed: constant, linear, cosine, wsd",
    ),
    ("kind: cosine", "kind: 3", "15: schedule.kind: 3 is not allowed; allowed: constant, linear, cosine, wsd"),
    (
        "kind: causal_lm",
        "kind: a2c",
        "13: algorithm.kind: the text 'a2c' is not allowed; allowed: causal_lm, sft, masked_diffusion, block_diffusion, "
        "score_entropy, reward_model, process_reward, dpo, kto, orpo, simpo, distillation",
    ),
    (
        "steps: 100",
        "steps: 100\nprecision: bf-16",
        "4: precision: the text 'bf-16' is not allowed; did you mean 'bf16'?; allowed: fp32, bf16_autocast, bf16_mixed, bf16, fp16_mixed",
    ),
    # types
    (
        "steps: 100",
        "steps: 1_000",
        "3: steps: expected an integer, given the text '1_000'; write it as plain digits, without quotes or separators",
    ),
    ("steps: 100", "steps: 1e3", "3: steps: expected an integer, given 1000.0; write 1000"),
    ("steps: 100", "steps: 1.5", "3: steps: expected an integer, given 1.5"),
    ("steps: 100", "steps: true", "3: steps: expected an integer, given true"),
    ("steps: 100", "steps: many", "3: steps: expected an integer, given the text 'many'"),
    (
        "lr: 1e-3",
        "lr: '1e-3'",
        "14: optimizer.lr: expected a number, given the text '1e-3'; write it as plain digits, without quotes or separators",
    ),
    (
        "lr: 1e-3",
        "lr: null",
        "14: optimizer has no lr, and only fine-tuning and learning from preferences have a default",
    ),
    ("lr: 1e-3", "lr: .inf", "14: optimizer.lr: expected a finite number, given inf"),
    ("lr: 1e-3", "lr: .nan", "14: optimizer.lr: expected a finite number, given nan"),
    ("name: minimal", "name: 12", "1: name: expected text, given 12; put it in quotes"),
    ("paths: [a.txt]", "paths: a.txt", "12: data.train.0.paths: expected a list, given the text 'a.txt'"),
    ("paths: [a.txt]", "paths: [1]", "12: data.train.0.paths.0: expected text, given 1; put it in quotes"),
    ("{sequences: 8}", "8", "4: batch: expected a section of key: value lines, given 8"),
    (
        "{kind: causal_lm}",
        "causal_lm",
        "13: algorithm: expected a section of key: value lines, given the text 'causal_lm'",
    ),
    (
        "{kind: cosine, warmup_steps: 5}",
        "cosine",
        "15: schedule: expected a section of key: value lines, given the text 'cosine'",
    ),
    (
        "{hidden_size: 64, num_hidden_layers: 2}",
        "[1]",
        "8: model.config: expected a section of key: value lines, given a list of 1",
    ),
    (
        "steps: 100",
        "steps: 100\nengine: {compile: yes}",
        "4: engine.compile: expected true or false, given the text 'yes'",
    ),
    ("steps: 100", "steps: {a: 1, b: 2}", "3: steps: expected an integer, given a section with a, b"),
    # bounds
    ("lr: 1e-3", "lr: 0", "14: optimizer.lr: must be greater than 0, given 0"),
    ("vocab_size: 300", "vocab_size: 100", "9: tokenizer.vocab_size: must be at least 270, given 100"),
    ("lr: 1e-3", "lr: 1e-3, betas: [0.9, 1.0]", "14: optimizer.betas.1: must be less than 1, given 1.0"),
    ("warmup_steps: 5", "min_ratio: 2", "15: schedule.min_ratio: must be at most 1, given 2"),
    ("lr: 1e-3", "lr: 1e-3, betas: [0.9]", "14: optimizer.betas: must have at least 2 items, given 1"),
    ("lr: 1e-3", "lr: 1e-3, betas: [0, 0, 0]", "14: optimizer.betas: must have at most 2 items, given 3"),
    ("paths: [a.txt]", "paths: []", "12: data.train.0.paths: must have at least 1 item, given 0"),
    (
        "name: minimal",
        "name: a b",
        "1: name: may hold letters, digits, '.', '_' and '-' and begins with a letter or digit, given the text 'a b'",
    ),
    (
        "name: minimal",
        "name: ../up",
        "1: name: may hold letters, digits, '.', '_' and '-' and begins with a letter or digit, given the text '../up'",
    ),
    (
        "{kind: causal_lm}",
        "{kind: process_reward, separator: ''}",
        "13: algorithm.separator: must have at least 1 character, given 0",
    ),
    ("name: minimal", f"name: {'a' * 300}", "1: name: must have at most 255 characters, given 300"),
    ("steps: 100", "steps: 10000000000000", "3: steps: must be at most 1e+12, given 10000000000000"),
    (
        "sequence_length: 128",
        "sequence_length: 1000000000000",
        "2: sequence_length: must be at most 1e+08, given 1000000000000",
    ),
    # what keys say together
    ("{sequences: 8}", "{}", "4: batch: give exactly one of sequences and tokens (null takes the other away)"),
    ("steps: 100\n", "", "1: give exactly one of steps and epochs (null takes the other away)"),
    ("steps: 100", "epochs: 1", None),
    ("{sequences: 8}", "{tokens: 1000}", "4: batch.tokens (1000) is no multiple of sequence_length (128)"),
    ("warmup_steps: 5", "warmup_steps: 101", "15: schedule.warmup_steps (101) exceeds steps (100)"),
    (
        "tokenizer: {kind: sentencepiece, vocab_size: 300}\n",
        "",
        "5: a model from a config brings no tokenizer; give tokenizer",
    ),
    (
        "    - {kind: text",
        "    - {kind: python, weight: 1}\n    - {kind: text",
        "10: data: a weight is given for some training sources only; give it for all or for none",
    ),
    (
        "    - {kind: text",
        "    - {kind: python, weight: 1}\n    - {weight: 1e-19, kind: text",
        "11: data: train has a source of weight 1e-19 beside one of 1: no run would draw from it; leave it out, or give it 1e-09 of the other or more",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES)
def test_one_mistake(write: Write, old: str, new: str, message: str | None) -> None:
    assert old in MINIMAL
    file = write(MINIMAL.replace(old, new))
    if message is None:
        load_recipe(file)
    else:
        assert mistakes(file) == [message]


def test_all_mistakes_at_once(write: Write) -> None:
    text = MINIMAL.replace("steps: 100", "stepz: 100").replace("lr: 1e-3", "lr: -1").replace("kind: text", "kind: txt")
    places = {line.split(": ")[0] + ": " + line.split(": ")[1] for line in mistakes(write(text + "stepz: 3\n"))}
    assert places == {
        "3: stepz",
        "12: data.train.0.kind",
        "14: optimizer.lr",
        "16: key 'stepz' is given twice; first at 3",
    }


def test_a_long_value_is_cut(write: Write) -> None:
    (line,) = mistakes(write(MINIMAL.replace("steps: 100", f"steps: {'x' * 500}")))
    assert len(line) < 130


def test_fields_of_a_config_are_free(write: Write) -> None:
    """They are transformers' own; the model checks them. Their names may be those of union tags."""
    recipe = load_recipe(write(MINIMAL.replace("{hidden_size: 64,", "{config: {kind: x}, lr: 3, ratio: .inf,"))).recipe
    assert recipe.model.model_dump()["config"]["config"] == {"kind": "x"}
