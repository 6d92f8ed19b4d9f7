"""Truths of sampling: caches and padding change nothing, and exact models give back their distribution."""

import itertools

import pytest
import torch
from torch import Tensor

from llmtrain.models.attention import Visible
from llmtrain.models.decoder import HeadFunction
from llmtrain.models.diffusion import Diffusion
from llmtrain.sampling.batched import Sampling
from llmtrain.sampling.canvas import Canvas, Draft, Layout, lay_out
from llmtrain.sampling.denoising import Denoiser, Prefix
from llmtrain.sampling.drawing import Draws, write_texts
from llmtrain.sampling.samplers import Sampler, Unmasking
from llmtrain.sampling.writing import Work
from tests import tiny
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASK, MASKED, MASKED_SHIFTED, UNIFORM, UNIFORM_SHIFTED, Exact

CPU = torch.device("cpu")


def drafts(*lengths: int, seed: int = 0) -> list[Draft]:
    """Prompts of these lengths, each with 16 places after it."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(4, 95, (length,), generator=generator).tolist() for length in lengths]
    return [Draft(text + [2] * 16, range(len(text), len(text) + 16)) for text in texts]


def sharp_decoder() -> torch.nn.Module:
    """Random weights, large enough for every token to matter to the others."""
    decoder = tiny.decoder(max_position_embeddings=64).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
    return decoder


# ------------------------------------------------------------- truth 11: a cached block is a whole forward


@pytest.mark.parametrize("diffusion", [BLOCK, BLOCK_SHIFTED], ids=["plain", "shift"])
def test_blocks_with_a_cache_are_those_of_whole_forwards(diffusion: Diffusion) -> None:
    """As a text is decoded: prompts of unequal length, blocks in part given, rows that leave, columns kept."""
    layout = lay_out(drafts(3, 8, 13), diffusion, None, 2)
    denoiser = Denoiser(sharp_decoder().double(), diffusion, CPU)
    canvas, prefix, worst = layout.canvas, Prefix(), 0.0
    for number, (start, end) in enumerate(layout.stages):
        part = canvas.part(torch.arange(3), end)
        in_block = part.open.clone()
        in_block[:, :start] = False
        for step in range(2):
            places = in_block.flatten().nonzero().squeeze(1)
            whole = denoiser.logits(part, places)
            (cached,) = denoiser.predict(
                part, places, lambda logits, _: (logits,), prefix, max(0, start - (1 if diffusion.shift else 0))
            )
            worst = max(worst, float((whole - cached)[:, :MASK].abs().max()))
            if step == 0:  # some of the block's tokens, at random
                some = torch.rand(len(places), generator=torch.Generator().manual_seed(number)) < 0.5
                part.ids.view(-1)[places[some]] = whole[some].argmax(1)
                in_block.view(-1)[places[some]] = False
        part.ids[in_block] = 7
        canvas.ids[:, :end] = part.ids
    assert prefix.length > 0
    assert worst < 1e-6  # computed in float64, and given in float32: the last bit


@pytest.mark.parametrize("sampler", ["first-hitting", "threshold", "llada"])
@pytest.mark.parametrize("diffusion", [BLOCK, BLOCK_SHIFTED], ids=["plain", "shift"])
def test_texts_written_with_and_without_the_cache_are_equal(diffusion: Diffusion, sampler: Sampler) -> None:
    denoiser = Denoiser(sharp_decoder(), diffusion, CPU)
    texts = [
        written(denoiser, drafts(3, 8, 13, 1), Unmasking(sampler, threshold=0.5, cache=cache))
        for cache in (False, True)
    ]
    assert texts[0] == texts[1]


def written(
    denoiser: Denoiser, texts: list[Draft], unmasking: Unmasking, names: list[int] | None = None
) -> list[list[int]]:
    """What the drafts become, without padding."""
    layout = lay_out(texts, denoiser.diffusion, unmasking.block_length, 2)
    write_in(denoiser, layout, unmasking, names or list(range(len(texts))))
    assert not layout.canvas.open.any()
    return [ids[text].tolist() for ids, text in zip(layout.canvas.ids, layout.canvas.text, strict=True)]


def write_in(denoiser: Denoiser, layout: Layout, unmasking: Unmasking, names: list[int], vocabulary: int = 96) -> Work:
    draws = Draws(Sampling(temperature=1.0), [(name, 0) for name in names], layout.starts, layout.canvas.ids.shape[1])
    work = Work()
    write_texts(denoiser, layout, unmasking, draws, vocabulary, work)
    return work


# ---------------------------------------------------------------------- truth 16: padding changes nothing


@pytest.mark.parametrize("diffusion", [MASKED, MASKED_SHIFTED, BLOCK, BLOCK_SHIFTED, UNIFORM, UNIFORM_SHIFTED], ids=str)
def test_padding_changes_no_logits(diffusion: Diffusion) -> None:
    denoiser = Denoiser(sharp_decoder(), diffusion, CPU)
    asked = drafts(3, 8, 13)
    together = lay_out(asked, diffusion, None, 2)
    assert not together.canvas.text.all()
    for row, draft in enumerate(asked):
        alone = lay_out([draft], diffusion, None, 2).canvas
        theirs = denoiser.logits(alone, alone.open.flatten().nonzero().squeeze(1))
        width = together.canvas.ids.shape[1]
        ours = denoiser.logits(together.canvas, row * width + together.canvas.open[row].nonzero().squeeze(1))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    filled = together.canvas.ids.masked_fill(~together.canvas.text, 50)
    other = Canvas(filled, together.canvas.text, together.canvas.open, together.canvas.given)
    places = together.canvas.open.flatten().nonzero().squeeze(1)
    assert torch.equal(denoiser.logits(other, places), denoiser.logits(together.canvas, places))


UNMASKING = [
    Unmasking("llada", steps=5, block_length=8),
    Unmasking("llada", remasking="random"),
    Unmasking("threshold", threshold=0.3, block_length=4, cache=True),
    Unmasking("first-hitting"),
    Unmasking("ancestral", steps=6),
]


@pytest.mark.parametrize(
    ("diffusion", "unmasking"),
    [*itertools.product([MASKED, BLOCK_SHIFTED], UNMASKING), (UNIFORM, UNMASKING[-1])],
    ids=lambda value: value.process if isinstance(value, Diffusion) else value.sampler,
)
def test_a_text_is_the_same_in_any_company(diffusion: Diffusion, unmasking: Unmasking) -> None:
    denoiser = Denoiser(sharp_decoder(), diffusion, CPU)
    asked = drafts(3, 8, 13, 4)
    together = written(denoiser, asked, unmasking)
    assert together == [written(denoiser, [draft], unmasking, [row])[0] for row, draft in enumerate(asked)]


# ------------------------------------------------------- truth 12: exact models give back their distribution

VOCABULARY, LENGTH, NUM = 3, 4, 8_000  # tokens, of which the first is given; texts that are drawn


def toy(seed: int = 1) -> Tensor:
    """The probability of each text of four tokens that begins with 0: tokens that depend on each other."""
    table = torch.zeros([VOCABULARY] * LENGTH, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    table[0] = torch.softmax(
        2 * torch.randn([VOCABULARY] * (LENGTH - 1), generator=generator).double().flatten(), 0
    ).view([VOCABULARY] * (LENGTH - 1))
    return table


def drawn(diffusion: Diffusion, unmasking: Unmasking) -> Tensor:
    """How often each text comes out, [V ** 4], of NUM."""
    denoiser = Denoiser(Exact(toy(), shift=diffusion.shift), diffusion, CPU)
    layout = lay_out([Draft([0] * LENGTH, range(1, LENGTH))] * NUM, diffusion, unmasking.block_length, 0)
    write_in(denoiser, layout, unmasking, list(range(NUM)), VOCABULARY)
    numbers = (layout.canvas.ids * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return torch.bincount(numbers, minlength=VOCABULARY**LENGTH).double()


def distance(counts: Tensor) -> float:
    """Total variation."""
    return float((counts / NUM - toy().flatten()).abs().sum() / 2)


def chi_square(counts: Tensor) -> float:
    """In standard deviations of its distribution, over the texts that are likely enough."""
    expected = toy().flatten() * NUM
    likely = expected > 5
    value = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    return float((value - freedom) / (2 * freedom) ** 0.5)


OF_TOY = {
    "masked": Diffusion("masked", VOCABULARY, shift=False),
    "masked, shift": Diffusion("masked", VOCABULARY, shift=True),
    "block": Diffusion("block", VOCABULARY, shift=False, block_size=2),
    "block, shift": Diffusion("block", VOCABULARY, shift=True, block_size=2),
}


@pytest.mark.parametrize("name", OF_TOY)
@pytest.mark.parametrize("sampler", ["first-hitting", "llada", "threshold"])
def test_one_token_a_step_gives_the_models_distribution(name: str, sampler: Sampler) -> None:
    """In random order, or in one that depends on what is known."""
    counts = drawn(OF_TOY[name], Unmasking(sampler, threshold=1.0))
    assert counts.sum() == NUM and counts[toy().flatten() == 0].sum() == 0
    assert abs(chi_square(counts)) < 4


def test_ancestral_steps_bring_the_distribution_nearer() -> None:
    distances = [distance(drawn(OF_TOY["masked"], Unmasking("ancestral", steps=steps))) for steps in (1, 2, 4, 16, 256)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 5 * distances[-1]
    assert abs(chi_square(drawn(OF_TOY["masked"], Unmasking("ancestral", steps=1 << 20)))) < 4


@pytest.mark.parametrize("steps", [1, 2])
def test_ancestral_steps_are_the_reverse_process(steps: int) -> None:
    """Enumerated: in each of S steps left, a masked place is unmasked with probability 1 / S, by itself."""
    table = toy()[0]
    expected = torch.zeros_like(table)
    for when in itertools.product(range(steps), repeat=LENGTH - 1):
        chosen = torch.ones_like(table)
        for step in range(steps):
            known = [place for place in range(LENGTH - 1) if when[place] < step]
            for place in (place for place in range(LENGTH - 1) if when[place] == step):
                both = _marginal(table, [*known, place])
                chosen = chosen * both / _marginal(table, known)
        expected += chosen / steps ** (LENGTH - 1)
    counts = drawn(OF_TOY["masked"], Unmasking("ancestral", steps=steps))[: expected.numel()]
    likely = expected.flatten() * NUM > 5
    spread = (expected.flatten() * NUM).sqrt()
    assert ((counts - expected.flatten() * NUM).abs() < 4.5 * spread)[likely].all()
    assert float((table - expected).abs().sum() / 2) > 0.2  # which is not the model's distribution


def _marginal(table: Tensor, places: list[int]) -> Tensor:
    others = [place for place in range(table.dim()) if place not in places]
    return table.sum(others, keepdim=True) if others else table


def test_the_first_hitting_times_are_those_of_the_process() -> None:
    """The times at which n places are hit, drawn as t *= u^(1/n), are the order statistics of uniform ones."""
    generator, num = torch.Generator().manual_seed(0), 5
    t, times = torch.ones(40_000, dtype=torch.float64), []
    for left in range(num, 0, -1):
        t = t * torch.rand(len(t), generator=generator, dtype=torch.float64) ** (1 / left)
        times.append(t)
    uniform = torch.rand(40_000, num, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    for hit, ordered in zip(times, uniform.unbind(1), strict=True):
        grid = torch.linspace(0, 1, 50, dtype=torch.float64)
        distance = ((hit[:, None] < grid).double().mean(0) - (ordered[:, None] < grid).double().mean(0)).abs().max()
        assert distance < 0.015  # Kolmogorov-Smirnov, at about one in ten thousand


def test_uniform_noise_gives_back_independent_tokens_in_any_number_of_steps() -> None:
    """Their posterior does not depend on other tokens, so that the model can be exact without being told the rate."""
    generator = torch.Generator().manual_seed(3)
    marginals = torch.softmax(torch.randn(LENGTH, VOCABULARY, generator=generator).double(), 1)

    class Independent(torch.nn.Module):
        def forward(self, ids: Tensor, positions: Tensor, head: HeadFunction[Tensor], visible: Visible) -> Tensor:
            linear = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False)
            torch.nn.init.eye_(linear.weight)
            return head(marginals.log().float().expand(len(ids), -1, -1), linear)

    layout = lay_out([Draft([0] * LENGTH, range(1, LENGTH))] * NUM, UNIFORM, None, 0)
    write_in(
        Denoiser(Independent(), UNIFORM, CPU), layout, Unmasking("ancestral", steps=5), list(range(NUM)), VOCABULARY
    )
    assert (layout.canvas.ids[:, 0] == 0).all()
    for place in range(1, LENGTH):
        counts = torch.bincount(layout.canvas.ids[:, place], minlength=VOCABULARY) / NUM
        deviation = (marginals[place] * (1 - marginals[place]) / NUM).sqrt()
        assert ((counts - marginals[place]).abs() < 4 * deviation).all()
