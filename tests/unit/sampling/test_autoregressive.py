"""Samples while training, against transformers' own generate."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmtrain.models.decoder import Decoder
from llmtrain.sampling.autoregressive import continue_prompts, sample_tokens
from tests import tiny

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27]]
NEVER = 95  # an end-of-text token that this model happens not to choose
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 12,
    "temperature": 0.0,
    "eos_id": NEVER,
    "max_length": 64,
    "device": torch.device("cpu"),
    "seed": 0,
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    # with a larger spread than usual, so that its choices depend on the context and are far from ties
    return tiny.decoder(seed=3, initializer_range=0.5, max_position_embeddings=64).eval()


def continued(decoder: Decoder, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    return continue_prompts(decoder, prompts, **(SETTINGS | settings))


def generated(hf: PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    """Greedy, by transformers, one prompt at a time."""
    batch = torch.tensor([prompt])
    output = hf.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=num,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        use_cache=True,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_greedy_equals_transformers_for_prompts_of_any_length(decoder: Decoder) -> None:
    ours = continued(decoder)
    assert ours == [generated(decoder.hf, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(completion) for completion in ours}) == len(PROMPTS)


def test_one_prompt_at_a_time_is_the_same(decoder: Decoder) -> None:
    assert continued(decoder) == [continued(decoder, [prompt])[0] for prompt in PROMPTS]


def test_it_stops_at_end_of_text_each_prompt_for_itself(decoder: Decoder) -> None:
    whole = continued(decoder)
    eos = whole[0][3]
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in whole]
    assert continued(decoder, eos_id=eos) == expected
    assert len(expected[0]) <= 4 < max(len(tokens) for tokens in expected)


def test_it_stops_at_the_models_window(decoder: Decoder) -> None:
    whole = continued(decoder)
    assert continued(decoder, max_length=10) == [
        tokens[: 10 - len(prompt)] for prompt, tokens in zip(PROMPTS, whole, strict=True)
    ]
    assert continued(decoder, [PROMPTS[3]], max_length=8) == [[]]


def test_a_seed_means_the_same_text(decoder: Decoder) -> None:
    first = continued(decoder, temperature=1.0, seed=1)
    assert continued(decoder, temperature=1.0, seed=1) == first
    assert continued(decoder, temperature=1.0, seed=2) != first
    # and neither needs nor changes the generators that training draws from
    before = torch.get_rng_state()
    continued(decoder, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_takes_the_most_likely_and_a_small_one_nearly_so() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    assert sample_tokens(logits, 0.0, generator).tolist() == [1, 0]
    assert sample_tokens(logits, 0.01, generator).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    num = 20_000
    tokens = sample_tokens(logits.expand(num, 4), temperature, torch.Generator().manual_seed(0))
    frequencies = tokens.bincount(minlength=4) / num
    # four standard errors of a share are at most 4 * 0.5 / sqrt(20,000)
    torch.testing.assert_close(frequencies, torch.softmax(logits / temperature, 0), rtol=0, atol=0.0142)


def test_bfloat16_models_are_sampled_too() -> None:
    half = tiny.decoder(dtype=torch.bfloat16).eval()
    assert [len(tokens) for tokens in continued(half, temperature=1.0, max_new_tokens=3)] == [3] * 4
