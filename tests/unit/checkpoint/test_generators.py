import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.files import write_tensors
from llmtrain.checkpoint.generators import capture_generators, restore_generators


def _draw() -> list[object]:
    return [
        torch.randn(3).tolist(),
        torch.randperm(5).tolist(),
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(70),
        np.random.randn(3).tolist(),
        np.random.randint(0, 100, 4).tolist(),
    ]


@pytest.mark.parametrize("gauss_pending", [False, True])
def test_the_draws_after_restoring_are_those_after_capturing(tmp_path: Path, gauss_pending: bool) -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    if gauss_pending:  # both generators make normals in pairs and keep the second one
        random.gauss(0, 1)
        np.random.randn(1)
    write_tensors(tmp_path / "a", capture_generators())
    first = _draw()
    assert _draw() != first
    restore_generators(load_file(tmp_path / "a"))
    assert _draw() == first


def test_capturing_draws_nothing() -> None:
    torch.manual_seed(1)
    first = torch.randn(3)
    torch.manual_seed(1)
    capture_generators()
    assert torch.equal(torch.randn(3), first)
