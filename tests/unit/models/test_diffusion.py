"""diffusion.json, which says how the weights beside it are to be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import InputError
from llmtrain.models.diffusion import FILE, Diffusion, diffusion_of, load_diffusion, save_diffusion
from tests import tiny

CASES: list[tuple[dict[str, Any], Diffusion]] = [
    ({"kind": "masked_diffusion"}, Diffusion("masked", 7, shift=False)),
    ({"kind": "masked_diffusion", "shift": True, "task": "sft"}, Diffusion("masked", 7, shift=True)),
    ({"kind": "block_diffusion", "block_size": 4}, Diffusion("block", 7, shift=False, block_size=4)),
    (
        {
            "kind": "block_diffusion",
            "block_size": 4,
            "shift": True,
            "curriculum": [{"from_step": 0, "block_size": 1}, {"from_step": 5, "block_size": 4}],
        },
        Diffusion("block", 7, shift=True, block_size=4),
    ),
    ({"kind": "score_entropy"}, Diffusion("masked", 7, shift=False)),
    ({"kind": "score_entropy", "noise": "uniform", "shift": True}, Diffusion("uniform", None, shift=True)),
]


@pytest.mark.parametrize(("algorithm", "expected"), CASES)
def test_what_a_recipe_trains_is_saved_and_loaded(
    algorithm: dict[str, Any], expected: Diffusion, tmp_path: Path
) -> None:
    diffusion = diffusion_of(tiny.recipe(algorithm=algorithm), 7)
    assert diffusion == expected
    save_diffusion(diffusion, tmp_path)
    assert load_diffusion(tmp_path) == expected
    content = json.loads((tmp_path / FILE).read_text())
    assert content["format"] == 1 and content["process"] == expected.process


def test_without_the_file_a_model_is_autoregressive(tmp_path: Path) -> None:
    assert load_diffusion(tmp_path) is None
    assert diffusion_of(tiny.recipe(), None) is None


GOOD = {"format": 1, "process": "block", "mask_token_id": 7, "shift": False, "block_size": 4}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ("{}", "cannot be read"),
        (json.dumps(GOOD | {"format": 2}), "of a format that this version does not read"),
        (json.dumps(GOOD | {"temperature": 1}), "cannot be read.*temperature"),
        (json.dumps(GOOD | {"process": "gaussian"}), "process is 'gaussian'"),
        (json.dumps(GOOD | {"mask_token_id": None}), "mask_token_id is None"),
        (json.dumps(GOOD | {"mask_token_id": -1}), "mask_token_id is -1"),
        (json.dumps(GOOD | {"mask_token_id": True}), "mask_token_id is True"),
        (json.dumps(GOOD | {"shift": 1}), "shift is 1"),
        (json.dumps(GOOD | {"block_size": None}), "block_size is None"),
        (json.dumps(GOOD | {"block_size": 0}), "block_size is 0"),
        (json.dumps(GOOD | {"block_size": 2.5}), "block_size is 2.5"),
        (json.dumps(GOOD | {"process": "masked"}), "block_size is 4"),
    ],
)
def test_a_file_that_is_wrong_is_told(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        load_diffusion(tmp_path)
    assert caught.value.where == str(tmp_path / FILE) and caught.value.remedy
