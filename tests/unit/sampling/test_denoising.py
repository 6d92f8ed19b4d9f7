"""Logits at open places, against whole forwards of one text at a time."""

import pytest
import torch
from torch import Tensor

from llmtrain.models import loss_head
from llmtrain.models.attention import bidirectional, block_causal
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.loss_head import EXCLUDED
from llmtrain.sampling.canvas import Canvas, Draft, lay_out
from llmtrain.sampling.denoising import Denoiser, Prefix
from tests import tiny
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASK, MASKED, MASKED_SHIFTED, UNIFORM, UNIFORM_SHIFTED

CPU = torch.device("cpu")
ALL = [MASKED, MASKED_SHIFTED, BLOCK, BLOCK_SHIFTED, UNIFORM, UNIFORM_SHIFTED]
# Holes in the middle, and a text that goes on.
DRAFTS = [Draft([4, 5, 6, 7, 8, 9, 10, 11, 12], [2, 3, 6]), Draft([20, 21, 22, 0, 0], [3, 4])]


def name(diffusion: Diffusion) -> str:
    return f"{diffusion.process}{'-shift' if diffusion.shift else ''}"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32} if request.param == "gpt2" else {}
    decoder = tiny.decoder(request.param, **sizes).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    return decoder


@torch.no_grad()
def slow(decoder: Decoder, diffusion: Diffusion, draft: Draft) -> Tensor:
    """Logits [places, V] of a text alone, with no padding and all of the logits computed."""
    ids = torch.tensor([list(draft.ids)])
    ids[0, list(draft.open)] = diffusion.mask_token_id if diffusion.mask_token_id is not None else 2
    positions = torch.arange(ids.shape[1])[None]
    visible = bidirectional if diffusion.block_size is None else block_causal(positions // diffusion.block_size)
    logits: Tensor = decoder(ids, positions, lambda hidden, head: head(hidden), visible)
    logits = logits[0].float()
    if diffusion.mask_token_id is not None:
        logits[:, MASK] = -torch.inf
    return logits[torch.tensor(list(draft.open)) - (1 if diffusion.shift else 0)]


def places(canvas: Canvas, row: int | None = None) -> Tensor:
    found = canvas.open if row is None else canvas.open & (torch.arange(len(canvas.open)) == row)[:, None]
    return found.flatten().nonzero().squeeze(1)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.softmax(1), theirs.softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("diffusion", ALL, ids=name)
def test_logits_are_those_of_the_text_alone(decoder: Decoder, diffusion: Diffusion) -> None:
    canvas = lay_out(DRAFTS, diffusion, None, 2).canvas
    denoiser = Denoiser(decoder, diffusion, CPU)
    for row, draft in enumerate(DRAFTS):
        ours = denoiser.logits(canvas, places(canvas, row))
        same(ours, slow(decoder, diffusion, draft))
        assert ours.dtype == torch.float32


def test_the_mask_has_no_probability(decoder: Decoder) -> None:
    canvas = lay_out(DRAFTS, MASKED, None, 2).canvas
    logits = Denoiser(decoder, MASKED, CPU).logits(canvas, places(canvas))
    assert (logits[:, MASK] < EXCLUDED / 2).all() and (logits.softmax(1)[:, MASK] == 0).all()


def test_in_chunks_as_in_one(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = lay_out(DRAFTS, MASKED, None, 2).canvas
    denoiser = Denoiser(decoder, MASKED, CPU, guidance=1.5)
    whole = denoiser.logits(canvas, places(canvas))
    monkeypatch.setattr(loss_head, "rows_per_chunk", lambda hidden, weight: 2)
    parts: list[slice] = []

    def seen(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        parts.append(part)
        return logits, logits.argmax(1)

    logits, top = denoiser.predict(canvas, places(canvas), seen)
    torch.testing.assert_close(logits, whole)
    assert torch.equal(top, whole.argmax(1))
    assert [part.start for part in parts] == [0, 2, 4]


@pytest.mark.parametrize("diffusion", [MASKED, MASKED_SHIFTED], ids=name)
def test_guidance_is_away_from_what_is_said_without_the_given_tokens(decoder: Decoder, diffusion: Diffusion) -> None:
    """What was written stays there (LLaDA): only the prompt is hidden."""
    canvas = lay_out(DRAFTS, diffusion, None, 2).canvas
    w, theirs = 1.5, []
    for row, draft in enumerate(DRAFTS):
        first, *rest = draft.open
        column = int(canvas.open[row].nonzero()[0])
        canvas.ids[row, column], canvas.open[row, column] = 40, False
        written = [40 if place == first else token for place, token in enumerate(draft.ids)]
        hidden = [40 if place == first else MASK for place in range(len(draft.ids))]
        cond, un = (slow(decoder, diffusion, Draft(ids, rest)) for ids in (written, hidden))
        theirs.append((un + (w + 1) * (cond - un)).nan_to_num(nan=-torch.inf))
    ours = Denoiser(decoder, diffusion, CPU, guidance=w).logits(canvas, places(canvas))
    same(ours, torch.cat(theirs))


@pytest.mark.parametrize("diffusion", [BLOCK, BLOCK_SHIFTED], ids=name)
def test_a_prefix_of_some_rows(decoder: Decoder, diffusion: Diffusion) -> None:
    texts = [Draft(list(range(start, start + 12)), range(8, 12)) for start in (10, 30, 50)]
    canvas = lay_out(texts, diffusion, None, 2).canvas
    denoiser, prefix = Denoiser(decoder, diffusion, CPU), Prefix()
    denoiser.predict(canvas, places(canvas), lambda logits, _: (logits,), prefix, keep=7)
    assert prefix.length == 7
    rows = torch.tensor([0, 2])
    some = canvas.part(rows, 12)
    ours = denoiser.logits(some, places(some), prefix.of_rows(rows, 3))
    same(ours, torch.cat([slow(decoder, diffusion, texts[row]) for row in (0, 2)]))
    assert prefix.length == 7 and prefix.cache.get_seq_length() == 7


def test_a_prefix_of_a_bidirectional_model_is_what_it_was(decoder: Decoder) -> None:
    """Exact while nothing changed; then the prefix does not hear of it, and the rest does."""
    text = Draft(list(range(10, 22)), range(6, 12))
    canvas = lay_out([text], MASKED, None, 2).canvas
    denoiser, prefix = Denoiser(decoder, MASKED, CPU, guidance=0.5), Prefix()
    (first,) = denoiser.predict(canvas, places(canvas), lambda logits, _: (logits,), prefix, keep=6)
    again = denoiser.logits(canvas, places(canvas), prefix)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)
    canvas.ids[0, 11], canvas.open[0, 11] = 40, False
    near, whole = denoiser.logits(canvas, places(canvas), prefix), denoiser.logits(canvas, places(canvas))
    assert not torch.equal(near, first[:-1]) and not torch.allclose(near, whole, rtol=0, atol=1e-6)
    assert (near - whole)[:, :MASK].abs().mean() < (first[:-1] - whole)[:, :MASK].abs().mean()
