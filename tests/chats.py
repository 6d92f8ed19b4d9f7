"""A tiny chat model on disk and conversations for it: what fine-tuning begins with."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_training import train_sentencepiece
from llmtrain.recipe.schema import SentencePieceTokenizer
from tests.runs import RECIPE, TEXT
from tests.tiny import LLAMA

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(directory: Path, **fields: Any) -> PreTrainedTokenizerBase:
    """A tiny Llama with random weights and a ChatML tokenizer that marks assistant turns; returns the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = SentencePieceTokenizer(
        kind="sentencepiece", vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], max_bytes=100_000
    )
    train_sentencepiece([TEXT, "system user assistant", "0 1 2 3 4 5 6 7 8 9 + = < > / answer"], spec, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {**LLAMA, "vocab_size": len(tokenizer), "tie_word_embeddings": False, "max_position_embeddings": 256}
    AutoModelForCausalLM.from_config(LlamaConfig(**{**shape, **ids, **fields})).save_pretrained(directory)
    return tokenizer


def conversations(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged conversations of one to three exchanges, some with a system message."""
    chooser, words = random.Random(seed), TEXT.split()

    def said(most: int) -> str:
        return " ".join(chooser.choices(words, k=chooser.randint(1, most)))

    rows = []
    for number in range(num):
        messages = [{"role": "system", "content": said(4)}] if number % 3 == 0 else []
        for _ in range(chooser.randint(1, 3)):
            messages += [{"role": "user", "content": said(6)}, {"role": "assistant", "content": said(8)}]
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_recipe(directory: Path, **overrides: Any) -> dict[str, Any]:
    """A fine-tuning recipe with its model and conversations, all in `directory`."""
    if not (directory / "model").exists():
        write_chat_model(directory / "model")
        write_jsonl(directory / "chats.jsonl", conversations(60))
    recipe = {key: value for key, value in RECIPE.items() if key not in ("tokenizer", "model")}
    return recipe | {
        "name": "sft",
        "output_dir": str(directory / "runs"),
        "sequence_length": 96,
        "batch": {"sequences": 4, "micro_sequences": 2},
        "model": {"kind": "pretrained", "path": str(directory / "model")},
        "data": {
            "train": [{"kind": "jsonl", "paths": [str(directory / "chats.jsonl")]}],
            "validation_fraction": 0.15,
            "cache_dir": str(directory / "cache"),
        },
        "algorithm": {"kind": "sft"},
        **overrides,
    }
