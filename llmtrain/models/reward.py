"""What the weights of a model that scores do not tell: what its score means.

It lies in reward.json beside the weights, whether they are a whole model or an adapter, whose base is none.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llmtrain.errors import InputError
from llmtrain.models.beside import REMEDY, check_fields, read_beside, write_beside
from llmtrain.models.heads import PROCESS, Head
from llmtrain.models.refusals import LOADABLE, as_input_error
from llmtrain.models.weights import cached
from llmtrain.recipe.schema import ProcessReward, Recipe, RewardModel

FILE = "reward.json"
FORMAT = 1  # a reader refuses those that it does not know
SEPARATOR = "\n"  # where nothing else is said; TRL's default, too


@dataclass(frozen=True)
class Reward:
    """How a model that scores is to be used.

    Attributes:
        kind: outcome: the score of an answer is what the head says at its last token, less `bias`. process: the
            probability that a step is right is the second of the softmax of the head's two outputs at its last token.
        bias: the mean score of reference answers (InstructGPT, arXiv 2203.02155), so that theirs is 0; 0 for process.
        separator: stands after each step, and belongs to it; None for outcome.
    """

    kind: Literal["outcome", "process"]
    bias: float = 0.0
    separator: str | None = None


def reward_of(recipe: Recipe, bias: float = 0.0) -> Reward | None:
    """Of the model that the recipe trains; None of one that does not score."""
    match recipe.algorithm:
        case RewardModel():
            return Reward("outcome", bias)
        case ProcessReward(separator=separator):
            return Reward("process", separator=separator)
    return None


def known_reward(path: str, head: Head) -> Reward:
    """How a model that scores, in a directory or on the hub, is to be used; without a reward.json, as it is.

    Args:
        head: of the model.

    Raises:
        InputError: reward.json cannot be read, or does not fit the head.
    """
    with as_input_error(path, LOADABLE):
        file = cached(path, FILE, None)
    reward = None if file is None else load_reward(file.parent)
    if reward is None:
        return Reward("process", separator=SEPARATOR) if head is PROCESS else Reward("outcome")
    if (reward.kind == "process") != (head is PROCESS):
        message = f"kind is {reward.kind!r}, and the weights beside it are those of {head.what}"
        raise InputError(message, where=str(file), remedy=REMEDY)
    return reward


def save_reward(reward: Reward, directory: Path) -> None:
    """Writes reward.json."""
    assert math.isfinite(reward.bias)
    write_beside(directory / FILE, FORMAT, asdict(reward))


def load_reward(directory: Path) -> Reward | None:
    """What reward.json in a model's directory says; None without one.

    Raises:
        InputError: it is of a newer format, or holds something else.
    """
    file = directory / FILE
    reward = read_beside(file, FORMAT, Reward)
    if reward is None:
        return None
    is_process, separator = reward.kind == "process", reward.separator
    is_number = isinstance(reward.bias, int | float) and not isinstance(reward.bias, bool)
    wrong = {
        "kind": reward.kind not in ("outcome", "process"),
        "bias": not (is_number and math.isfinite(reward.bias)) or (is_process and reward.bias != 0),
        "separator": not (isinstance(separator, str) and separator) if is_process else separator is not None,
    }
    check_fields(asdict(reward), wrong, file)
    return reward
