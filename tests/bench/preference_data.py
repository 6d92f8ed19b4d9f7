"""What the preference benchmarks read: pairs of answers, a tokenizer and a model, made on the spot.

A prompt is the beginning of a docstring of the Python standard library, 20 to 200 tokens; the better answer
goes on with it, the worse one is the beginning of another docstring, 10 to 150 tokens each; all lengths
uniform and independent. Pairs whose prompt and answers do not fit into `LONGEST` tokens together are left
out, so that neither side cuts any. The weights are random: speed does not depend on them.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerBase

from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.python_tree import read
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import PythonSource
from tests.bench.sft import write_tokenizer

RECIPE = Path(__file__).with_name("preference.yaml")
PAIRS, ORDERED, WRITTEN = "pairs.jsonl", "ordered.jsonl", "preference.yaml"  # in the directory of inputs
PROMPT, ANSWER = (20, 200), (10, 150)  # tokens
LONGEST = 500  # tokens of a prompt and both answers; with what the template adds they fit into our rows
PAIRS_PER_STEP = 8
ALGORITHMS = {
    "reward": {"kind": "reward_model", "normalize": False},
    "dpo": {"kind": "dpo", "beta": 0.1, "reference": "cached"},
}
CLASSES = {"reward": AutoModelForSequenceClassification, "dpo": AutoModelForCausalLM}


def write_inputs(work: Path, kind: str, num_pairs: int, shape: dict[str, Any]) -> None:
    """A model directory with a tokenizer and its chat template, our recipe, and the pairs.

    The model is a Llama of `shape` (of its config), with the scoring head for `kind` reward, so that both
    sides begin with the same one.
    """
    model = work / "model"
    documents = [text for text in read(PythonSource(kind="python", content="docstrings")) if len(text) < 5000]
    tokenizer = write_tokenizer(model, documents)
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    CLASSES[kind].from_config(config).save_pretrained(model)
    made = list(pairs(tokenizer, documents, num_pairs))
    _write(work / PAIRS, made)
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["path"], recipe["data"]["train"][0]["paths"] = str(model), [str(work / PAIRS)]
    recipe["data"]["cache_dir"] = str(work / "cache")
    recipe["algorithm"] = ALGORITHMS[kind]
    (work / WRITTEN).write_text(yaml.safe_dump(recipe))
    _write(work / ORDERED, ordered(work / WRITTEN, tokenizer, made))


def ordered(path: Path, tokenizer: PreTrainedTokenizerBase, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs as our recipe trains on them, step by step; those of a step sorted, the longest first.

    So the peer has the same pairs in each step, and of about the same length in each micro-batch.
    """
    recipe = load_recipe(path).recipe
    cache = cache_directory(recipe.data.cache_dir)
    datasets = prepare_data(recipe, prepare_tokenizer(recipe, cache).tokenizer, cache)
    assert len(datasets.train[0]) == len(made), "every pair fits into a row of its own"
    _, indices = datasets.order(recipe.seed).rows_at(np.arange(len(made)))

    def longer(index: int) -> int:
        pair = made[index]
        conversations = [pair["prompt"] + pair[answer] for answer in ("chosen", "rejected")]
        return max(len(tokenizer.apply_chat_template(messages)["input_ids"]) for messages in conversations)

    steps = [indices[first : first + PAIRS_PER_STEP].tolist() for first in range(0, len(made), PAIRS_PER_STEP)]
    return [made[index] for step in steps for index in sorted(step, key=longer, reverse=True)]


def _write(path: Path, made: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in made))


def pairs(tokenizer: PreTrainedTokenizerBase, documents: list[str], num: int) -> Iterator[dict[str, Any]]:
    """`num` pairs in TRL's conversational format, always the same ones."""
    chooser = random.Random(0)
    found = 0
    while found < num:
        prompt, better, worse = chooser.randint(*PROMPT), chooser.randint(*ANSWER), chooser.randint(*ANSWER)
        if prompt + better + worse > LONGEST:
            continue
        text = _beginning(tokenizer, documents, chooser, prompt + better)
        other = _beginning(tokenizer, documents, chooser, worse)
        texts = [tokenizer.decode(part).strip() for part in (text[:prompt], text[prompt:], other)]
        if not all(texts):
            continue
        found += 1
        asked, chosen, rejected = texts
        yield {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def _beginning(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], chooser: random.Random, length: int
) -> list[int]:
    """The first `length` tokens of a document drawn from those that have as many."""
    while True:
        ids: list[int] = tokenizer.encode(chooser.choice(documents), add_special_tokens=False)
        if len(ids) >= length:
            return ids[:length]
