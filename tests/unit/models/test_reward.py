"""reward.json, which says what the score of the weights beside it means."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import InputError
from llmtrain.models.heads import OUTCOME, PROCESS
from llmtrain.models.reward import FILE, Reward, known_reward, load_reward, reward_of, save_reward
from tests import tiny

CASES: list[tuple[dict[str, Any], float, Reward]] = [
    ({"kind": "reward_model"}, 0.25, Reward("outcome", 0.25)),
    ({"kind": "reward_model"}, 0.0, Reward("outcome")),
    ({"kind": "process_reward"}, 0.0, Reward("process", separator="\n")),
    ({"kind": "process_reward", "separator": " ки"}, 0.0, Reward("process", separator=" ки")),
]


@pytest.mark.parametrize(("algorithm", "bias", "expected"), CASES)
def test_what_a_recipe_trains_is_saved_and_loaded(
    algorithm: dict[str, Any], bias: float, expected: Reward, tmp_path: Path
) -> None:
    reward = reward_of(tiny.recipe(algorithm=algorithm), bias)
    assert reward == expected
    save_reward(reward, tmp_path)
    assert load_reward(tmp_path) == expected
    assert known_reward(str(tmp_path), PROCESS if expected.kind == "process" else OUTCOME) == expected


def test_without_the_file_a_model_is_taken_as_it_is(tmp_path: Path) -> None:
    assert load_reward(tmp_path) is None
    assert reward_of(tiny.recipe()) is None
    assert known_reward(str(tmp_path), OUTCOME) == Reward("outcome", 0.0)
    assert known_reward(str(tmp_path), PROCESS) == Reward("process", 0.0, "\n")


def test_a_file_of_another_kind_than_the_weights(tmp_path: Path) -> None:
    save_reward(Reward("outcome", 1.0), tmp_path)
    with pytest.raises(InputError, match="kind is 'outcome', and the weights .* those of a process reward model"):
        known_reward(str(tmp_path), PROCESS)


GOOD = {"format": 1, "kind": "outcome", "bias": 0.5, "separator": None}
STEPS = {"format": 1, "kind": "process", "bias": 0.0, "separator": "\n"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD | {"format": 2}, "of a format that this version does not read"),
        (GOOD | {"scale": 2}, "cannot be read.*scale"),
        (GOOD | {"kind": "both"}, "kind is 'both'"),
        (GOOD | {"bias": None}, "bias is None"),
        (GOOD | {"bias": True}, "bias is True"),
        (GOOD | {"bias": float("nan")}, "bias is nan"),
        (GOOD | {"separator": "\n"}, "separator is"),
        (STEPS | {"bias": 1.0}, "bias is 1.0"),
        (STEPS | {"separator": None}, "separator is None"),
        (STEPS | {"separator": ""}, "separator is ''"),
    ],
)
def test_what_cannot_be_used_is_refused(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        load_reward(tmp_path)
