"""The random generators of this process as tensors, so that a resumed run draws the same numbers."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_PYTHON_VERSION = 3  # of random.getstate(): MT19937 with 624 words and a position


def capture_generators() -> dict[str, Tensor]:
    """States of torch's CPU generator, that of this process's GPU, Python's `random` and NumPy's.

    Only the current GPU: a process of ours computes on one, and asking after another one's
    generator would take memory there.
    """
    version, words, gauss = random.getstate()
    assert version == _PYTHON_VERSION
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    kind, keys, position, has_gauss, cached = legacy
    assert kind == "MT19937"
    states = {
        "torch_cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["torch_cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Puts back what `capture_generators` gave; a GPU's state is skipped where there is no GPU."""
    torch.set_rng_state(states["torch_cpu"])
    gauss = states["python_gauss"].tolist()
    random.setstate((_PYTHON_VERSION, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if torch.cuda.is_available() and "torch_cuda" in states:
        torch.cuda.set_rng_state(states["torch_cuda"])


def seed_generators(seed: int, rank: int) -> None:
    """Gives this rank generators of its own: what is drawn on different ranks is independent."""
    own = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0])
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)  # and every GPU's
