"""Tiny runs that learn from answers that were judged."""

import random
from pathlib import Path
from typing import Any

from tests.chats import sft_recipe, write_jsonl
from tests.runs import TEXT


def said(chooser: random.Random, most: int) -> str:
    return " ".join(chooser.choices(TEXT.split(), k=chooser.randint(1, most)))


def preferences(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of ragged lengths with a better answer, which begins with "fox", and a worse one; some margins."""
    chooser = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(num):
        prompt = [{"role": "user", "content": said(chooser, 12)}]
        better, worse = f"fox {number % 10} {said(chooser, 8)}", f"dog {number % 10} {said(chooser, 8)}"
        answers = {"chosen": better, "rejected": worse}
        row = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append({"prompt": prompt, **row, **({"margin": 0.5} if number % 3 == 0 else {})})
    return rows


def rankings(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two to four answers to a text, with ties."""
    chooser = random.Random(seed)
    rows = []
    for number in range(num):
        answers = [f"{word} {number} {said(chooser, 6)}" for word in ("fox", "dog", "tree", "river")]
        num_answers = chooser.randint(2, 4)
        ranks = [1, *(chooser.randint(2, 3) for _ in range(num_answers - 1))]
        rows.append({"prompt": f"{said(chooser, 9)} :", "completions": answers[:num_answers], "ranks": ranks})
    return rows


def labelled(num: int, seed: int = 0) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(preferences(num, seed)):
        good = number % 2 == 0
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows


def stepwise(num: int, seed: int = 0) -> list[dict[str, Any]]:
    chooser = random.Random(seed)
    rows = []
    for _ in range(num):
        labels = [chooser.random() < 0.6 for _ in range(chooser.randint(1, 4))]
        steps = [f"{'fox' if label else 'dog'} {said(chooser, 5)}" for label in labels]
        rows.append({"prompt": said(chooser, 9), "completions": steps, "labels": labels})
    return rows


# Kinds of algorithms, with the rows that each learns from.
ALGORITHMS: dict[str, tuple[dict[str, Any], str]] = {
    "reward_model": ({"kind": "reward_model", "centering": 0.01}, "preferences"),
    "reward_model, ranked": ({"kind": "reward_model"}, "rankings"),
    "reward_model, separate": ({"kind": "reward_model", "share_prompts": False}, "preferences"),
    "process_reward": ({"kind": "process_reward"}, "stepwise"),
    "dpo": ({"kind": "dpo"}, "preferences"),
    "dpo, ipo": ({"kind": "dpo", "loss": "ipo", "length_normalized": True}, "preferences"),
    "kto": ({"kind": "kto"}, "labelled"),
    "orpo": ({"kind": "orpo"}, "preferences"),
    "simpo": ({"kind": "simpo"}, "preferences"),
}
_ROWS = {"preferences": preferences, "rankings": rankings, "labelled": labelled, "stepwise": stepwise}


def judged_recipe(directory: Path, kind: str, **overrides: Any) -> dict[str, Any]:
    """A recipe of one of ALGORITHMS with its model and data, all in `directory`."""
    algorithm, rows = ALGORITHMS[kind]
    recipe = sft_recipe(directory)
    file = write_jsonl(directory / f"{rows}.jsonl", _ROWS[rows](60))
    data = recipe["data"] | {"train": [{"kind": "jsonl", "paths": [str(file)]}]}
    name = kind.replace(", ", "-").replace("_", "-")
    return recipe | {"name": name, "data": data, "algorithm": algorithm, **overrides}
