"""A reward model written by hand: it scores by the share of one word in what it reads.

One layer, whose attention is even over all tokens before. Of tokens of which a share s is LIKED the head sees

    x(s) = 32 s / sqrt(1 + 32 s^2)
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llmtrain.models.reward import Reward
from tests import scorers

LIKED = 50
SEPARATOR = " w90"


def write(directory: Path, kind: str, slope: float = 1.0, offset: float = 0.0) -> Path:
    """An outcome model has the score slope * x; of a process model offset + slope * x are the log-odds of right."""
    reward = Reward(kind, separator=SEPARATOR if kind == "process" else None)  # type: ignore[arg-type]
    scorers.write(directory, kind, reward, num_hidden_layers=1)
    model = scorers.model(kind, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 1] = 1
        embeddings[LIKED] = 0
        embeddings[LIKED, 0] = 1
        layer = model.model.layers[0].self_attn
        layer.v_proj.weight[0, 0] = layer.o_proj.weight[0, 0] = 1
        model.score.weight[-1, 0] = slope
        if kind == "process":
            model.score.bias[-1] = offset
    model.save_pretrained(directory)
    return directory


def seen(ids: Sequence[int]) -> float:
    """x of these tokens, of which the last is another word."""
    share = sum(number == LIKED for number in ids) / len(ids)
    return 32 * share / math.sqrt(1 + 32 * share**2)


def ids_of(text: str) -> list[int]:
    """Of a text of words (w3, w4, ...) as the model reads it, with what begins and ends a document."""
    return [0, *(int(word[1:]) for word in text.split()), 1]


def steps_seen(text: str) -> list[float]:
    """x at the end of each step."""
    ids = ids_of(text)
    return [seen(ids[: place + 1]) for place, number in enumerate(ids) if number == int(SEPARATOR[2:])]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
