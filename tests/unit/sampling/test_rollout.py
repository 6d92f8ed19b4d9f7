"""Answers written while training: with a cache as without, whoever is beside them, as their probabilities have it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrain.models.checks import Asked
from llmtrain.models.decoder import Decoder
from llmtrain.models.inputs import Prefix
from llmtrain.sampling.autoregressive import continue_prompts
from llmtrain.sampling.rollout import Writing, cache_obstacle, rollout
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27], [30, 31]]
SEEDS = [2**64 - 1, 0, 17, 5, 6]
NEVER = 95  # an end-of-text token that this model happens not to choose
MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
WRITING = Writing(
    max_new_tokens=12, temperature=1.0, end_ids=[NEVER], max_length=64, vocabulary=96, batch_tokens=1000, cached=True
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    # with a larger spread than usual, so that its choices depend on the context and are far from ties
    return tiny.decoder(seed=3, initializer_range=0.5, max_position_embeddings=64).eval()


def written(model: Decoder, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    seeds = settings.pop("seeds", SEEDS[: len(prompts)])
    return rollout(model, prompts, seeds, replace(WRITING, **settings), CPU)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("end", [NEVER, None])
def test_greedy_equals_the_slow_twin(cached: bool, end: int | None, decoder: Decoder) -> None:
    """`continue_prompts` reads whole texts, one forward a token; also where texts end at unequal times."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "max_length": 64, "device": CPU, "seed": 0}
    whole = continue_prompts(decoder, PROMPTS, eos_id=NEVER, **settings)
    end = whole[0][3] if end is None else end
    expected = continue_prompts(decoder, PROMPTS, eos_id=end, **settings)
    assert len({len(answer) for answer in expected}) > (1 if end != NEVER else 0)
    assert written(decoder, temperature=0.0, end_ids=[end], cached=cached) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_a_cache_the_same_is_sampled_as_without(architecture: str, attention: str) -> None:
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4} if architecture == "gpt2" else tiny.LLAMA
    model = tiny.decoder(architecture, **fields, attn_implementation=attention, initializer_range=0.3).eval()
    ended = written(model, end_ids=range(0, 96, 9))
    assert ended == written(model, end_ids=range(0, 96, 9), cached=False)
    assert len({len(answer) for answer in ended}) > 2
    assert all(token % 9 for answer in ended for token in answer[:-1])


def test_an_answer_depends_on_its_prompt_and_seed_alone(decoder: Decoder) -> None:
    together = written(decoder)
    for cached in (False, True):
        alone = [
            written(decoder, [prompt], seeds=[seed], cached=cached)[0]
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        assert alone == together
    assert written(decoder, batch_tokens=20) == written(decoder, batch_tokens=50) == together
    assert written(decoder, PROMPTS[::-1], seeds=SEEDS[::-1]) == together[::-1]
    assert all(a != b for a, b in zip(written(decoder, seeds=[seed + 1 for seed in range(5)]), together, strict=True))


def test_a_prompt_is_read_once_for_all_of_its_answers(decoder: Decoder) -> None:
    positions: list[int] = []
    embedding = decoder.hf.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, args: positions.append(args[0].numel()))
    prompts, seeds = [PROMPTS[place] for place in (0, 3, 0, 3, 3)], list(range(5))
    together = written(decoder, prompts, seeds=seeds, end_ids=[])
    hook.remove()
    assert positions == [2 * 8, *[5] * 11]
    assert together == [
        written(decoder, [prompt], seeds=[seed], end_ids=[])[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert len({tuple(answer) for answer in together}) == 5


@pytest.mark.parametrize("cached", [False, True])
def test_it_ends_at_the_longest_length(cached: bool, decoder: Decoder) -> None:
    whole = written(decoder)
    shorter = written(decoder, max_length=9, cached=cached)
    assert shorter == [answer[: 9 - len(prompt)] for prompt, answer in zip(PROMPTS, whole, strict=True)]


@pytest.mark.parametrize("cached", [False, True])
def test_texts_that_ended_do_not_run_out_of_the_models_positions(cached: bool) -> None:
    """The others go on behind a prompt that fills the window."""
    model = tiny.decoder("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=20).eval()
    answers = written(model, [[3] * 19, [4]], max_length=20, cached=cached)
    assert [len(answer) for answer in answers] == [1, 12]


def test_only_tokens_of_the_vocabulary_are_written() -> None:
    model = tiny.decoder(seed=1).eval()  # nearly even probabilities
    assert max(max(answer) for answer in written(model, max_new_tokens=40)) >= 40
    assert max(max(answer) for answer in written(model, max_new_tokens=40, vocabulary=40)) < 40


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, decoder: Decoder) -> None:
    num = 4000
    answers = written(
        decoder, [[10, 11]] * num, seeds=list(range(num)), max_new_tokens=1, temperature=temperature, batch_tokens=10**6
    )
    counts = torch.tensor([answer[0] for answer in answers]).bincount(minlength=96) / num
    logits = decoder(torch.tensor([[10, 11]]), None, lambda hidden, head: head(hidden[:, -1]))
    expected = torch.softmax(logits[0] / temperature, 0).detach()
    # five standard errors of a share
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / num).sqrt() + 1e-3).all()


def test_no_prompts_are_no_answers(decoder: Decoder) -> None:
    assert written(decoder, []) == []


def test_generators_that_training_draws_from_are_left_alone(decoder: Decoder) -> None:
    before = torch.get_rng_state()
    written(decoder)
    assert torch.equal(torch.get_rng_state(), before)


def obstacle(model: Decoder, max_length: int = 64) -> str | None:
    return cache_obstacle(Asked(model.eval(), model, CPU, exact=True), max_length)


def test_models_of_keys_and_values_take_a_cache(decoder: Decoder) -> None:
    assert obstacle(decoder) is None
    assert obstacle(tiny.decoder("gpt2", n_embd=32, n_layer=2, n_head=4)) is None
    # A window that no text is longer than
    assert obstacle(tiny.decoder("mistral", **tiny.LLAMA, sliding_window=64)) is None


def test_others_say_why_they_take_none() -> None:
    mamba = tiny.decoder("mamba2", **MAMBA2)
    assert "state that is not keys and values" in str(obstacle(mamba))
    window = tiny.decoder("mistral", **tiny.LLAMA, sliding_window=63)
    assert "windows of 63 tokens" in str(obstacle(window))
    bloom = tiny.decoder("bloom", hidden_size=32, n_layer=2, n_head=4)
    assert "not by position ids" in str(obstacle(bloom))
    with_prefix = tiny.decoder()
    with_prefix.prompt = Prefix(torch.nn.Embedding(2, 4 * 2 * 8), 2, 2, 2)
    assert "adapter" in str(obstacle(with_prefix))
    flash = tiny.decoder()
    flash.hf.config._attn_implementation = "flash_attention_2"
    assert "takes no mask" in str(obstacle(flash))


def test_a_model_that_predicts_otherwise_with_a_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would that reads no mask of ours: here, left padding is visible."""
    from llmtrain.models.attention import causal
    from llmtrain.sampling import rollout as module

    monkeypatch.setattr(module, "_behind", lambda padding: causal)
    assert "predicts otherwise" in str(obstacle(tiny.decoder(initializer_range=0.5)))


@pytest.mark.parametrize("architecture", ["mamba2", "bloom", "mistral"])
def test_models_without_a_cache_write_what_transformers_writes(architecture: str) -> None:
    """Whole texts padded on the right: nothing of a neighbour or of padding gets into a text."""
    fields: dict[str, dict[str, Any]] = {
        "mamba2": MAMBA2,
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mistral": tiny.LLAMA | {"sliding_window": 4},
    }
    model = tiny.decoder(architecture, **fields[architecture], initializer_range=0.5).eval()
    assert obstacle(model) is not None
    together = written(model, temperature=0.0, cached=False)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in answer:
            assert int(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)
