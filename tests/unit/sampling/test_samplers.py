"""How a diffusion model is sampled by default, and what does not fit it."""

from typing import Any

import pytest

from llmtrain.errors import InputError
from llmtrain.models.diffusion import Diffusion
from llmtrain.sampling.samplers import Asked, Unmasking, settled
from tests.diffusion import BLOCK, MASKED, UNIFORM


def test_defaults() -> None:
    assert settled(Asked(), None) is None
    assert settled(Asked(), MASKED) == Unmasking("llada", block_length=32)
    assert settled(Asked(), BLOCK) == Unmasking("first-hitting", cache=True)
    assert settled(Asked(), UNIFORM) == Unmasking("ancestral")


@pytest.mark.parametrize(
    ("asked", "diffusion", "expected"),
    [
        (Asked(threshold=0.5), MASKED, Unmasking("threshold", block_length=32, threshold=0.5)),
        (Asked(threshold=0.5), BLOCK, Unmasking("threshold", threshold=0.5, cache=True)),
        (Asked(sampler="threshold"), BLOCK, Unmasking("threshold", threshold=0.9, cache=True)),
        (Asked(steps=7), BLOCK, Unmasking("llada", steps=7, cache=True)),
        (Asked(remasking="random"), BLOCK, Unmasking("llada", remasking="random", cache=True)),
        (Asked(steps=7), UNIFORM, Unmasking("ancestral", steps=7)),
        (Asked(sampler="ancestral", steps=7), MASKED, Unmasking("ancestral", steps=7)),
        (Asked(sampler="first-hitting", block_length=8), MASKED, Unmasking("first-hitting", block_length=8)),
        (Asked(cfg=1.5, cache=True), MASKED, Unmasking("llada", block_length=32, guidance=1.5, cache=True)),
        (Asked(cache=False, cfg=0.0), BLOCK, Unmasking("first-hitting")),
        (Asked(cache=False), UNIFORM, Unmasking("ancestral")),
    ],
)
def test_what_is_asked_for(asked: Asked, diffusion: Diffusion, expected: Unmasking) -> None:
    assert settled(asked, diffusion) == expected


@pytest.mark.parametrize(
    ("asked", "diffusion", "option", "why"),
    [
        ({"steps": 3}, None, "--steps", "autoregressive"),
        ({"cache": False}, None, "--cache", "autoregressive"),
        ({"block_length": 8}, BLOCK, "--block-length", "blocks of 4 tokens"),
        ({"cfg": 1.0}, BLOCK, "--cfg", "block diffusion"),
        ({"sampler": "llada"}, UNIFORM, "--sampler", "uniform noise"),
        ({"remasking": "random"}, UNIFORM, "--remasking", "uniform noise"),
        ({"cache": True}, UNIFORM, "--cache", "uniform noise"),
        ({"cfg": 1.0}, UNIFORM, "--cfg", "uniform noise"),
        ({"sampler": "threshold", "steps": 3}, MASKED, "--steps", "llada and ancestral"),
        ({"threshold": 0.5, "steps": 3}, MASKED, "--steps", "not threshold"),
        ({"sampler": "first-hitting", "remasking": "random"}, MASKED, "--remasking", "llada"),
        ({"sampler": "ancestral", "threshold": 0.5}, MASKED, "--threshold", "not ancestral"),
    ],
)
def test_what_does_not_fit_is_refused(
    asked: dict[str, Any], diffusion: Diffusion | None, option: str, why: str
) -> None:
    with pytest.raises(InputError, match=why) as caught:
        settled(Asked(**asked), diffusion)
    assert caught.value.where == option
