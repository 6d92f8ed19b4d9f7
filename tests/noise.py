"""Noise of every kind, documents in rows, their noise read back, and plain forwards to compare losses with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmtrain.algorithms.block_diffusion import BlockDiffusion
from llmtrain.algorithms.masked_diffusion import MaskedDiffusion
from llmtrain.algorithms.score_entropy import ScoreEntropy
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.models.decoder import Decoder
from llmtrain.recipe import schema
from tests import tiny

MASK = tiny.VOCABULARY - 1
PAD = 2
LENGTH = 22  # of the rows below, where nothing else is said
MODELS = [(architecture, attention) for architecture in ("llama", "qwen3") for attention in ("sdpa", "eager")]


class Document(NamedTuple):
    """Token ids, and which of them are to be predicted."""

    ids: list[int]
    trained: list[bool]


class Masked(NamedTuple):
    """A masked token: what it was, and what it counts."""

    target: int
    weight: float


def masked(sequences: int = 3, seed: int = 0, **settings: Any) -> MaskedDiffusion:
    asked = schema.MaskedDiffusion(kind="masked_diffusion", **settings)
    return MaskedDiffusion(asked, seed, sequences, MASK, PAD)


def block(sequences: int = 3, seed: int = 0, length: int = LENGTH, eos_id: int = -1, **settings: Any) -> BlockDiffusion:
    asked = schema.BlockDiffusion(kind="block_diffusion", **({"block_size": 4} | settings))
    return BlockDiffusion(asked, seed, sequences, MASK, length, eos_id)


def score_entropy(noise: Any, sequences: int = 3, seed: int = 0, **settings: Any) -> ScoreEntropy:
    asked = schema.ScoreEntropy(kind="score_entropy", noise=noise, **settings)
    return ScoreEntropy(asked, seed, sequences, MASK if noise == "absorbing" else None, tiny.VOCABULARY)


PROCESSES: dict[str, Any] = {
    "masked": masked,
    "masked, shifted": lambda *a, **k: masked(*a, shift=True, **k),
    "masked, complementary": lambda *a, **k: masked(*a, complementary=True, **k),
    "masked, cropped": lambda *a, **k: masked(*a, random_length_share=0.99, **k),
    "masked, annealed": lambda *a, **k: masked(*a, annealing_steps=8, **k),
    "masked, by sequences": lambda *a, **k: masked(*a, normalization="sequences", **k),
    "block": block,
    "block, shifted, clipped": lambda *a, **k: block(*a, shift=True, clip=[0.3, 0.8], **k),
    "block of one": lambda *a, **k: block(*a, block_size=1, **k),
    "absorbing": lambda *a, **k: score_entropy("absorbing", *a, **k),
    "uniform": lambda *a, **k: score_entropy("uniform", *a, **k),
}


def documents(lengths: Sequence[int], seed: int = 0, prompt: int = 0) -> list[Document]:
    """Random ones, which begin with a token that is not predicted, and with `prompt` more of them."""
    chooser = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = [0, *chooser.integers(3, MASK, length - 1).tolist()]
        made.append(Document(ids, [place > min(prompt, length - 2) for place in range(length)]))
    return made


PACKED = documents([9, 5, 3, 14, 6, 2])
ROWS = [PACKED[:3], PACKED[3:5], PACKED[5:]]  # that are padded little, and much


def micro_of(rows: Sequence[Sequence[Document]], length: int, first: int = 0) -> MicroBatch:
    """Rows as the loader makes them; the first one stands at position `first` of the data order."""
    columns: dict[str, list[list[Any]]] = {
        name: [] for name in ("input_ids", "targets", "position_ids", "document_ids", "trained")
    }
    for row in rows:
        ids: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []
        trained: list[bool] = []
        for number, document in enumerate(row):
            ids += document.ids
            following = zip(document.ids[1:], document.trained[1:], strict=True)
            targets += [*(token if is_trained else -100 for token, is_trained in following), -100]
            positions += range(len(document.ids))
            numbers += [number] * len(document.ids)
            trained += document.trained
        rest = length - len(ids)
        assert rest >= 0
        columns["input_ids"].append(ids + [PAD] * rest)
        columns["targets"].append(targets + [-100] * rest)
        columns["position_ids"].append(positions + list(range(rest)))
        columns["document_ids"].append(numbers + [-1] * rest)
        columns["trained"].append(trained + [False] * rest)
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    tensors["counted"] = (tensors["targets"].flatten() != -100).nonzero()[:, 0]
    tensors["positions"] = torch.arange(first, first + len(rows))
    num_tokens = int((tensors["document_ids"] >= 0).sum())
    return MicroBatch(tensors, {POLICY: float(len(tensors["counted"]))}, num_tokens)


def decoder(architecture: str = "llama", attention: str = "sdpa", seed: int = 0, **fields: Any) -> Decoder:
    """A tiny model whose predictions depend strongly on what it sees."""
    shape = tiny.LLAMA | ({"head_dim": 8} if architecture == "qwen3" else {}) | fields
    model = tiny.decoder(architecture, seed, attn_implementation=attention, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def masked_in(before: MicroBatch, noised: MicroBatch, *, shift: bool, view: int = 0) -> list[dict[int, Masked]]:
    """Of each row the masked tokens, by their place, read back from what the head is told to compute.

    Args:
        before: the micro-batch as it was.
        view: which of several noisy versions of the rows, where there are several.
    """
    ids = before.tensors["input_ids"]
    num_rows, length = ids.shape
    width = noised.tensors["input_ids"].shape[1]  # 2T in block diffusion
    found: list[dict[int, Masked]] = [{} for _ in range(num_rows)]
    heads, targets, weights = (noised.tensors[name].tolist() for name in ("heads", "targets", "row_weights"))
    for head, target, weight in zip(heads, targets, weights, strict=True):
        row, column = divmod(head, width)
        if row // num_rows == view:
            found[row % num_rows][column % length + (1 if shift else 0)] = Masked(target, weight)
    noisy = noised.tensors["input_ids"][view * num_rows : (view + 1) * num_rows, :length]
    for row in range(num_rows):
        changed = (noisy[row] != ids[row]).nonzero()[:, 0].tolist()
        assert sorted(found[row]) == changed, "those that are predicted are those that are masked"
        assert all(noisy[row, place] == MASK for place in changed)
        assert all(masked.target == ids[row, place] for place, masked in found[row].items())
    return found


def spans_of(micro: MicroBatch) -> list[list[range]]:
    """Of each row the places of its documents."""
    spans = []
    for numbers in micro.tensors["document_ids"].tolist():
        places = [[place for place, own in enumerate(numbers) if own == number] for number in range(max(numbers) + 1)]
        spans.append([range(of_one[0], of_one[-1] + 1) for of_one in places])
    return spans


def log_probabilities(
    model: Decoder, ids: Sequence[int], positions: Sequence[int], visible: Callable[[int, int], bool]
) -> Tensor:
    """[n, V] of one sequence by transformers' own forward with whole logits; MASK has none.

    Args:
        visible: of the indices of a query and a key.
    """
    length = len(ids)
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min)
    for query in range(length):
        for key in range(length):
            if visible(query, key):
                mask[0, 0, query, key] = 0.0
    logits = model.hf(
        input_ids=torch.tensor([list(ids)]), position_ids=torch.tensor([list(positions)]), attention_mask=mask
    ).logits[0]
    excluded = torch.zeros(logits.shape[1])
    excluded[MASK] = -torch.inf
    logp: Tensor = (logits + excluded).log_softmax(1)
    return logp


def everything(query: int, key: int) -> bool:
    return True


def masked_loss(
    model: Decoder,
    before: MicroBatch,
    masked: Sequence[dict[int, Masked]],
    *,
    shift: bool = False,
    visible: Callable[[int, int], bool] = everything,
) -> Tensor:
    """LLaDA's loss, each document in a forward of its own: sum over masked of -weight * log p."""
    total = torch.zeros(())
    for row, spans in enumerate(spans_of(before)):
        for span in spans:
            ids = before.tensors["input_ids"][row, span.start : span.stop].tolist()
            noisy = [MASK if place in masked[row] else token for place, token in zip(span, ids, strict=True)]
            logp = log_probabilities(model, noisy, range(len(ids)), visible)
            for place in set(span) & set(masked[row]):
                own = place - span.start
                total = total - masked[row][place].weight * logp[own - (1 if shift else 0), ids[own]]
    return total


def block_loss(
    model: Decoder, before: MicroBatch, masked: Sequence[dict[int, Masked]], size: int, *, shift: bool = False
) -> Tensor:
    """BD3-LM's loss, each block of each document in a forward of its own, after the clean blocks before it."""
    total = torch.zeros(())
    for row, spans in enumerate(spans_of(before)):
        for span in spans:
            ids = before.tensors["input_ids"][row, span.start : span.stop].tolist()
            for start in range(0, len(ids), size):
                stop = min(start + size, len(ids))
                noisy = [MASK if span.start + own in masked[row] else ids[own] for own in range(start, stop)]
                logp = log_probabilities(
                    model, ids[:start] + noisy, range(stop), lambda query, key: query // size >= key // size
                )
                for own in range(start, stop):
                    if span.start + own in masked[row]:
                        # Before a block's first token stands the last one of the clean block before.
                        total = total - masked[row][span.start + own].weight * logp[own - (1 if shift else 0), ids[own]]
    return total


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return dict(zip(parameters, found, strict=True))


def assert_same_training(
    model: Decoder, ours: Tensor, theirs: Tensor, tolerance: float = 4e-6, of_gradients: float = 4e-6
) -> None:
    """The same loss, and gradients that differ by so much of each one's norm at most."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference <= of_gradients, f"{name}: {difference:.1e}"
