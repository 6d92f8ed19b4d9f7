"""A score is that of its answer: whatever stands beside it in a batch, and as transformers itself computes it."""

import pytest
import torch
from torch import Tensor

from llmtrain.models.attention import shared_prompts
from llmtrain.models.reward import Reward
from llmtrain.models.scorer import Scorer, load_scorer
from tests import scorers, tiny

PAD = 2
LENGTHS = (5, 17, 1, 30, 2, 29, 30)
ROWS = [
    torch.randint(3, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(length * 7 + place)).tolist()
    for place, length in enumerate(LENGTHS)
]
CLOSE = {"rel": 1e-4, "abs": 1e-5}
BIAS = 0.25


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shape(architecture: str) -> dict[str, int]:
    return {"n_embd": 32, "n_layer": 2, "n_head": 4} if architecture == "gpt2" else {}


@pytest.fixture(scope="module")
def outcome(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    directory = tmp_path_factory.mktemp("outcome")
    reward = Reward("outcome", BIAS)
    scorers.write(directory, "outcome", reward, architecture=architecture, **shape(architecture))
    return load_scorer(str(directory))


@torch.no_grad()
def by_transformers(architecture: str, side: str) -> list[float]:
    """Logits of transformers' own forward on one padded batch, less the bias."""
    model = scorers.model("outcome", architecture, **shape(architecture))
    longest = max(LENGTHS)
    padding = [[PAD] * (longest - len(row)) for row in ROWS]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(ROWS, padding, strict=True)]
    ids = torch.tensor(padded)
    mask = ids != PAD
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)  # as generate counts them
    logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
    return [value - BIAS for value in logits[:, 0].tolist()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_that_of_transformers_whichever_side_is_padded(
    outcome: Scorer, architecture: str, side: str
) -> None:
    assert outcome.scores(ROWS) == pytest.approx(by_transformers(architecture, side), **CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 40, 60, 10_000])
def test_a_score_does_not_depend_on_its_batch(outcome: Scorer, batch_tokens: int) -> None:
    alone = [outcome.scores([row])[0] for row in ROWS]
    assert outcome.scores(ROWS, batch_tokens) == pytest.approx(alone, **CLOSE)
    assert outcome.scores(ROWS[::-1], batch_tokens) == pytest.approx(alone[::-1], **CLOSE)
    assert len(set(alone)) == len(ROWS)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_what_the_decoder_says_is_what_transformers_says(kind: str, architecture: str) -> None:
    decoder = scorers.decoder(kind, architecture, **shape(architecture))
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            ours = decoder(ids, None, lambda hidden, head: head(hidden))
            theirs = decoder.hf(input_ids=ids).logits
        torch.testing.assert_close(ours[:, -1] if kind == "outcome" else ours, theirs)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_packed_answers_score_as_alone(kind: str) -> None:
    decoder = scorers.decoder(kind)
    ids = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    with torch.no_grad():
        packed = decoder(ids, positions, lambda hidden, head: head(hidden))[0]
        for row, part in zip(ROWS, packed.split(LENGTHS), strict=True):
            alone = decoder(torch.tensor([row]), None, lambda hidden, head: head(hidden))[0]
            torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)


def test_answers_that_share_their_prompt_score_as_alone() -> None:
    decoder = scorers.decoder("outcome")
    prompt, answers = ROWS[1], [ROWS[0], ROWS[4]]
    ids = torch.tensor([prompt + answers[0] + answers[1]])
    segments = torch.tensor([[256] * len(prompt) + [257] * len(answers[0]) + [258] * len(answers[1])])
    start = len(prompt)
    positions = torch.tensor([[*range(start), *(start + i for answer in answers for i in range(len(answer)))]])
    with torch.no_grad():
        shared = decoder(ids, positions, lambda hidden, head: head(hidden), shared_prompts(segments))[0, :, 0]
        for answer, place in zip(answers, (start + 4, start + 6), strict=True):
            alone = decoder(torch.tensor([prompt + answer]), None, lambda hidden, head: head(hidden))[0, -1, 0]
            torch.testing.assert_close(shared[place], alone, rtol=1e-4, atol=1e-5)
