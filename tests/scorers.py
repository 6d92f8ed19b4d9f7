"""Tiny models that score, on a disk and not."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from llmtrain.models.decoder import Decoder
from llmtrain.models.heads import OUTCOME, PROCESS, Head
from llmtrain.models.reward import Reward, save_reward
from tests import tiny

KINDS = {"outcome": OUTCOME, "process": PROCESS}


def model(kind: str, architecture: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode; large ones, so that scores differ clearly."""
    head: Head = KINDS[kind]
    shape = tiny.LLAMA if architecture == "llama" else {}
    config = AutoConfig.for_model(
        architecture, **({"vocab_size": tiny.VOCABULARY, "eos_token_id": 1, "max_position_embeddings": 64} | shape)
    )
    config.update(fields)
    head.configure(config, tiny.tokenizer())
    torch.manual_seed(seed)
    made: PreTrainedModel = head.auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    return made


def decoder(kind: str, architecture: str = "llama", seed: int = 0, **fields: Any) -> Decoder:
    made = model(kind, architecture, seed, **fields)
    decoder: Decoder = Decoder(made, KINDS[kind].attribute(made)).eval()
    return decoder


def write(directory: Path, kind: str, reward: Reward | None = None, **fields: Any) -> Path:
    """The tiny model and its tokenizer in files, with a reward.json where one is given."""
    model(kind, **fields).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    if reward is not None:
        save_reward(reward, directory)
    return directory
