"""Completions of diffusion models: batches against single prompts, ends, holes, and what it all costs."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from llmtrain.models.attention import bidirectional, block_causal
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.saved import Saved, load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling, draw
from llmtrain.sampling.canvas import Draft, lay_out
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.diffusion import DiffusionGenerator, Step
from llmtrain.sampling.samplers import Sampler, Unmasking
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASK, MASKED, MASKED_SHIFTED, UNIFORM, write_diffusion_model

KINDS = {
    "masked": MASKED,
    "masked-shift": MASKED_SHIFTED,
    "block": BLOCK,
    "block-shift": BLOCK_SHIFTED,
    "uniform": UNIFORM,
}
MASKING = ("masked", "masked-shift", "block", "block-shift")
ENDS = (1, *range(4, 16))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    directory = tmp_path_factory.mktemp("diffusion")
    return {name: load_saved(str(write_diffusion_model(directory / name, kind))) for name, kind in KINDS.items()}


def prompts(num: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randint(4, 94) for _ in range(chooser.randint(1, longest))] for _ in range(num)]


def usual(saved: Saved) -> Unmasking:
    assert saved.diffusion is not None
    match saved.diffusion.process:
        case "masked":
            return Unmasking("llada", block_length=8)
        case "block":
            return Unmasking("first-hitting", cache=True)
        case _:
            return Unmasking("ancestral", steps=6)


def answers(
    saved: Saved,
    requests: list[Request],
    sampling: Sampling,
    unmasking: Unmasking | None = None,
    ends: tuple[int, ...] = (),
    batch_tokens: int = 10_000,
) -> list[Completion]:
    generator = DiffusionGenerator(saved, ends, sampling, unmasking or usual(saved), batch_tokens)
    found: dict[int, Completion] = {}

    def take(index: int, completion: Completion) -> None:
        assert index not in found
        found[index] = completion

    generator.generate(requests, take)
    return [found[index] for index in range(len(requests))]


def cost(saved: Saved, prompt: list[int], sampling: Sampling, unmasking: Unmasking) -> int:
    generator = DiffusionGenerator(saved, (), sampling, unmasking)
    generator.generate([Request(prompt)], lambda index, completion: None)
    assert generator.work.forwards == generator.work.row_forwards and generator.seconds > 0
    return generator.work.forwards


# --------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_batches_equal_single_prompts(models: dict[str, Saved], name: str, temperature: float) -> None:
    requests = [Request(ids, row, row % 2) for row, ids in enumerate(prompts(7))]
    sampling = Sampling(max_new_tokens=14, temperature=temperature, seed=3)
    together = answers(models[name], requests, sampling, ends=ENDS)
    in_parts = answers(models[name], requests, sampling, ends=ENDS, batch_tokens=80)
    assert together == in_parts == answers(models[name], requests, sampling, ends=ENDS, batch_tokens=1)
    assert together == answers(models[name], requests[::-1], sampling, ends=ENDS)[::-1]
    for completion in together:
        ended = completion.ids[-1] in ENDS
        assert completion.finish == ("stop" if ended else "length")
        assert not any(token in ENDS for token in completion.ids[:-1])
        assert len(completion.ids) == 14 or ended
        assert MASK not in completion.ids or name == "uniform"
    if temperature:
        assert together != answers(
            models[name], requests, Sampling(max_new_tokens=14, temperature=1.0, seed=4), ends=ENDS
        )


def test_parts_of_an_answer_have_numbers_of_their_own_and_limits(models: dict[str, Saved]) -> None:
    (ids, *_), sampling = prompts(1), Sampling(max_new_tokens=14, temperature=1.0)
    asked = [Request(ids), Request(ids, part=1), Request(ids, part=2), Request(ids, part=1), Request(ids, limit=5)]
    whole, first, second, again, short = (done.ids for done in answers(models["masked"], asked, sampling))
    assert first == again and len({whole, first, second}) == 3 and len(short) == 5


@pytest.mark.parametrize("name", KINDS)
def test_ending_early_changes_no_text(models: dict[str, Saved], name: str) -> None:
    """What is behind a row's end is not written, and what is before it is as if it had been."""
    requests = [Request(ids, row) for row, ids in enumerate(prompts(6, seed=5))]
    sampling = Sampling(max_new_tokens=14, temperature=1.0)
    free = answers(models[name], requests, sampling)
    cut = answers(models[name], requests, sampling, ends=ENDS)
    assert any(completion.finish == "stop" for completion in cut)
    for whole, part in zip(free, cut, strict=True):
        assert whole.ids[: len(part.ids)] == part.ids


@pytest.mark.parametrize("sampler", ["llada", "threshold", "first-hitting", "ancestral"])
@pytest.mark.parametrize("name", ["block", "block-shift"])
def test_the_cache_of_blocks_changes_no_text(models: dict[str, Saved], name: str, sampler: Sampler) -> None:
    requests = [Request(ids, row) for row, ids in enumerate(prompts(6))]
    sampling = Sampling(max_new_tokens=14, temperature=0.7)
    found = [
        answers(models[name], requests, sampling, Unmasking(sampler, threshold=0.3, cache=cache), ENDS)
        for cache in (False, True)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler", ["llada", "threshold"])
@pytest.mark.parametrize("name", ["masked", "masked-shift"])
def test_a_prefix_cache_of_bidirectional_models_writes_all_places(
    models: dict[str, Saved], name: str, sampler: Sampler
) -> None:
    requests = [Request(ids, row) for row, ids in enumerate(prompts(6))]
    unmasking = Unmasking(sampler, block_length=4, threshold=0.3, cache=True, guidance=0.5)
    found = answers(models[name], requests, Sampling(max_new_tokens=14), unmasking)
    assert [len(completion.ids) for completion in found] == [14] * 6
    assert found == answers(models[name], requests, Sampling(max_new_tokens=14), unmasking, batch_tokens=1)
    # With one step a block every forward is a whole one.
    once = [Unmasking("llada", steps=1, block_length=4, cache=cache) for cache in (False, True)]
    exact = [answers(models[name], requests, Sampling(max_new_tokens=14), how) for how in once]
    assert exact[0] == exact[1]


# --------------------------------------------------------------------------------------- steps


@torch.no_grad()
def slow(saved: Saved, prompt: list[int], num: int, unmasking: Unmasking) -> list[int]:
    """LLaDA's and Fast-dLLM's loops as they are written down: one text, whole forwards, greedy, a place at a time."""
    diffusion, decoder = saved.diffusion, Decoder(saved.decoder)
    assert diffusion is not None
    size = diffusion.block_size or unmasking.block_length or num
    begin = len(prompt) // size * size if diffusion.block_size else len(prompt)
    total = -(-(len(prompt) + num) // size) * size if diffusion.block_size else len(prompt) + num
    ids = prompt + [MASK] * (total - len(prompt))
    written = total - len(prompt)
    for start in range(begin, total, size):
        block = [place for place in range(start, min(start + size, total)) if ids[place] == MASK]
        steps = len(block) if unmasking.steps is None else math.ceil(unmasking.steps * len(block) / written)
        step = 0
        while still := [place for place in block if ids[place] == MASK]:
            end = start + size if diffusion.block_size else total
            row, positions = torch.tensor([ids[:end]]), torch.arange(end)[None]
            visible = block_causal(positions // size) if diffusion.block_size else bidirectional
            logits = decoder(row, positions, lambda hidden, head: head(hidden), visible)[0].float()
            logits[:, MASK] = -torch.inf
            of = {place: logits[place - (1 if diffusion.shift else 0)].softmax(0) for place in still}
            ranked = sorted(still, key=lambda place: (-float(of[place].max()), place))
            if unmasking.sampler == "threshold":
                chosen = [place for place in still if of[place].max() >= unmasking.threshold] or ranked[:1]
            else:
                chosen = ranked[: len(block) // steps + (1 if step < len(block) % steps else 0)]
            for place in chosen:
                ids[place] = int(of[place].argmax())
            step += 1
    return ids[len(prompt) : len(prompt) + num]


@pytest.mark.parametrize(
    "unmasking",
    [
        Unmasking("llada", block_length=5),
        Unmasking("llada", steps=7, block_length=5),
        Unmasking("threshold", threshold=0.25, block_length=5),
    ],
    ids=["one a step", "steps", "threshold"],
)
@pytest.mark.parametrize("name", MASKING)
def test_texts_are_those_of_the_plain_loops(models: dict[str, Saved], name: str, unmasking: Unmasking) -> None:
    requests = [Request(ids, row) for row, ids in enumerate(prompts(5))]
    unmasking = replace(unmasking, cache=name.startswith("block"))
    found = answers(models[name], requests, Sampling(max_new_tokens=13), unmasking)
    for request, completion in zip(requests, found, strict=True):
        assert list(completion.ids) == slow(models[name], list(request.ids), 13, unmasking)


@pytest.mark.parametrize("name", MASKING)
def test_steps_are_forwards(models: dict[str, Saved], name: str) -> None:
    saved, prompt, sampling = models[name], list(range(20, 32)), Sampling(max_new_tokens=16)
    assert cost(saved, prompt, sampling, Unmasking("llada", block_length=4)) == 16
    assert cost(saved, prompt, sampling, Unmasking("llada", steps=8, block_length=4)) == 8
    assert cost(saved, prompt, sampling, Unmasking("llada", steps=8, block_length=4, remasking="random")) == 8
    assert cost(saved, prompt, sampling, Unmasking("llada", steps=100, block_length=4)) == 16
    assert cost(saved, prompt, sampling, Unmasking("first-hitting")) == 16
    assert cost(saved, prompt, sampling, Unmasking("ancestral", steps=1_000_000)) == 16
    assert cost(saved, prompt, sampling, Unmasking("ancestral", steps=4)) <= 4
    assert cost(saved, prompt, sampling, Unmasking("threshold", threshold=1.0)) == 16
    assert cost(saved, prompt, sampling, Unmasking("threshold", threshold=0.01)) == (1 if name.startswith("m") else 4)


@pytest.mark.parametrize("name", MASKING)
def test_threshold_1_is_one_at_a_time(models: dict[str, Saved], name: str) -> None:
    requests = [Request(ids, row) for row, ids in enumerate(prompts(5))]
    sampling = Sampling(max_new_tokens=14, temperature=1.0)
    one = answers(models[name], requests, sampling, Unmasking("llada", block_length=4))
    assert one == answers(models[name], requests, sampling, Unmasking("threshold", threshold=1.0, block_length=4))
    some = answers(models[name], requests, sampling, Unmasking("threshold", threshold=0.2, block_length=4))
    assert one != some


def test_tokens_per_forward(models: dict[str, Saved]) -> None:
    generator = DiffusionGenerator(models["masked"], (), Sampling(max_new_tokens=12), Unmasking("llada", steps=4))
    generator.generate([Request(ids, row) for row, ids in enumerate(prompts(3))], lambda index, completion: None)
    work = generator.work
    assert (work.forwards, work.row_forwards, work.tokens, work.tokens_per_forward) == (4, 12, 36, 3.0)


def test_ended_rows_take_no_more_forwards(models: dict[str, Saved]) -> None:
    work = []
    for ends in ((), tuple(range(96))):
        generator = DiffusionGenerator(
            models["masked"], ends, Sampling(max_new_tokens=12), Unmasking("llada", block_length=4)
        )
        generator.generate([Request(ids, row) for row, ids in enumerate(prompts(3))], lambda index, completion: None)
        work.append(generator.work)
    assert work[0].row_forwards == 36 and work[1].row_forwards < 3 * 5


# --------------------------------------------------------------------------------------- holes


@pytest.mark.parametrize("name", MASKING)
def test_holes_are_filled_and_the_rest_stays(models: dict[str, Saved], name: str) -> None:
    chooser = random.Random(1)
    texts = [ids for ids in prompts(8, longest=30) if len(ids) > 4]
    holes = [sorted(chooser.sample(range(1, len(ids)), chooser.randint(1, len(ids) - 2))) for ids in texts]
    asked = [
        [MASK if place in gone else token for place, token in enumerate(ids)]
        for ids, gone in zip(texts, holes, strict=True)
    ]
    requests = [Request(ids, row) for row, ids in enumerate(asked)]
    every = tuple(range(4, 96, 2))  # would end half of all texts
    found = answers(models[name], requests, Sampling(temperature=1.0), ends=every)
    for ids, gone, completion in zip(texts, holes, found, strict=True):
        words = completion.text.split()
        assert completion.finish == "filled" and len(completion.ids) == len(gone)
        filled = dict(zip(gone, completion.ids, strict=True))
        expected = [filled.get(place, token) for place, token in enumerate(ids)]
        assert words == models[name].tokenizer.decode(expected, skip_special_tokens=True).split()
        last = max((place for place in range(len(ids)) if place not in gone), default=-1)
        assert not any(token in every for place, token in filled.items() if place < last)
        assert MASK not in completion.ids
    assert found == answers(models[name], requests, Sampling(temperature=1.0), ends=every, batch_tokens=1)


def test_holes_and_texts_to_continue_in_one_command(models: dict[str, Saved]) -> None:
    requests = [Request([20, 21]), Request([20, MASK, 22], 1), Request([30, 31, 32], 2)]
    found = answers(models["masked"], requests, Sampling(max_new_tokens=9))
    assert [completion.finish for completion in found] == ["length", "filled", "length"]
    assert [len(completion.ids) for completion in found] == [9, 1, 9]


def test_what_fits(models: dict[str, Saved]) -> None:
    generator = DiffusionGenerator(models["block"], (), Sampling(max_new_tokens=100), Unmasking("first-hitting"))
    assert generator.room(60) == 4 and generator.fits([20] * 63)
    assert not generator.fits([20] * 64)
    assert generator.fits([20] * 63 + [MASK]) and not generator.fits([20] * 64 + [MASK])
    [done] = answers(models["block"], [Request([20] * 61)], Sampling(max_new_tokens=100))
    assert (len(done.ids), done.finish) == (3, "length")


# --------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", ["masked", "block", "uniform"])
def test_stop_texts(models: dict[str, Saved], name: str) -> None:
    [free] = answers(models[name], [Request([20, 21])], Sampling(max_new_tokens=8, temperature=1.0))
    words = free.text.split()
    sampling = Sampling(max_new_tokens=8, temperature=1.0, stop=(words[3], "never"))
    [stopped] = answers(models[name], [Request([20, 21])], sampling)
    first = words.index(words[3])
    assert stopped.finish == "stop"
    assert stopped.text.split() == words[:first]
    assert len(stopped.ids) == first + 1


@pytest.mark.parametrize("name", KINDS)
def test_text_comes_in_pieces_that_stay(models: dict[str, Saved], name: str) -> None:
    pieces: list[str] = []
    done: list[Completion] = []
    generator = DiffusionGenerator(
        models[name], (), Sampling(max_new_tokens=12, stop=("nothing",)), usual(models[name])
    )
    generator.generate([Request([20, 21])], lambda _, completion: done.append(completion), pieces.append)
    assert "".join(pieces) == done[0].text
    assert len([piece for piece in pieces if piece]) > (1 if name != "uniform" else 0)


def test_steps_can_be_looked_at(models: dict[str, Saved]) -> None:
    steps: list[Step] = []
    generator = DiffusionGenerator(models["masked"], (), Sampling(max_new_tokens=6), Unmasking("llada", steps=3))
    generator.on_step = steps.append
    done: list[Completion] = []
    generator.generate([Request([20, 21])], lambda _, completion: done.append(completion))
    assert [sum(step.open) for step in steps] == [4, 2, 0]
    assert all(sum(step.new) == 2 for step in steps)
    assert tuple(steps[-1].ids) == (20, 21, *done[0].ids)
    for before, after in itertools.pairwise(steps):
        assert all(a == b for a, b, was_open in zip(before.ids, after.ids, before.open, strict=True) if not was_open)


# --------------------------------------------------------------------------------------- draws


def test_draws_are_those_of_gumbel_noise() -> None:
    """The slow twin: argmax of logits / T plus Gumbel noise in float64, with a number for each token."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -6.0]], dtype=torch.float64).expand(200_000, -1)
    generator = torch.Generator().manual_seed(0)
    noise = -torch.rand(logits.shape, generator=generator, dtype=torch.float64).log()
    theirs = torch.bincount((logits / 0.7 - noise.log()).argmax(1), minlength=5)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    ours = torch.bincount(draw((logits / 0.7).softmax(1), uniform, 1.0)[:, 0], minlength=5)
    spread = (theirs + ours).double().sqrt()
    assert ((theirs - ours).abs() <= 4 * spread).all()


@pytest.mark.parametrize("kind", [MASKED, BLOCK_SHIFTED], ids=["masked", "block-shift"])
def test_one_token_is_drawn_from_the_models_probabilities(models: dict[str, Saved], kind: Diffusion) -> None:
    saved = models["masked" if kind is MASKED else "block-shift"]
    requests = [Request([20, 21, MASK, 23], 0, sample) for sample in range(3000)]
    done = answers(saved, requests, Sampling(temperature=2.0), batch_tokens=100_000)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in done]), minlength=96)
    canvas = lay_out([Draft([20, 21, MASK, 23], [2])], kind, None, 2).canvas
    logits = Denoiser(Decoder(saved.decoder), kind, saved.device).logits(canvas, torch.tensor([2]))[0]
    expected = torch.softmax(logits.double() / 2.0, 0)
    deviation = (counts / 3000 - expected).abs() / (expected * (1 - expected) / 3000).sqrt().clamp_min(1e-4)
    assert deviation.max() < 4.5  # of 96 normal deviates the largest is seldom over 4


def test_a_seed_is_a_text(models: dict[str, Saved]) -> None:
    def text(seed: int, sample: int) -> tuple[int, ...]:
        return answers(models["uniform"], [Request([20], 0, sample)], Sampling(8, 1.0, seed=seed))[0].ids

    assert text(0, 0) == text(0, 0)
    assert len({text(0, 0), text(0, 1), text(1, 0), text(1, 1)}) == 4
