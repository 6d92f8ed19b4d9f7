"""Micro-batches of answers from token lists, laid out by hand: the slow twin of `data/group_batches.py`."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.models.decoder import Decoder
from tests import tiny

Layout = Literal["shared", "separate", "padded"]
LAYOUTS: tuple[Layout, ...] = ("shared", "separate", "padded")
PAD = 2


class Group(NamedTuple):
    """A prompt with its answers, as token ids; the level of each answer, less is better."""

    prompt: list[int]
    answers: list[list[int]]
    levels: list[float]
    margin: float = 0.0


class Placed(NamedTuple):
    """A token in a row."""

    token: int
    position: int
    segment: int


def drawn_group(
    num_prompt: int, lengths: Sequence[int], levels: Sequence[float], seed: int = 0, margin: float = 0.0
) -> Group:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompt, *answers = (
        torch.randint(3, tiny.VOCABULARY, (num,), generator=generator).tolist() for num in (num_prompt, *lengths)
    )
    return Group(prompt, answers, list(levels), margin)


def laid_out(
    groups: Sequence[Group],
    layout: Layout = "separate",
    groups_a_row: int = 2,
    references: Sequence[float] | None = None,
    kl: float | None = None,
    weight: float | None = None,
) -> MicroBatch:
    """A micro-batch of the groups; `weight` by default their number."""
    rows: list[list[Placed]] = []
    known: list[tuple[int, int, int, list[int]]] = []  # row, column before, column of the last, tokens of each answer
    for index, group in enumerate(groups):
        if layout != "padded" and index % groups_a_row == 0:
            rows.append([])
        number = index % groups_a_row + 1
        asked = [Placed(token, position, 256 * number) for position, token in enumerate(group.prompt)]
        if layout == "shared":
            rows[-1] += asked
        prompt_end = len(rows[-1]) - 1 if layout == "shared" else None
        for k, answer in enumerate(group.answers, start=1):
            if layout == "padded":
                rows.append([])
            if layout != "shared":
                rows[-1] += asked
            before = len(rows[-1]) - 1 if prompt_end is None else prompt_end
            said = [Placed(t, len(asked) + i, 256 * number + k) for i, t in enumerate(answer)]
            rows[-1] += said
            known.append((len(rows) - 1, before, len(rows[-1]) - 1, answer))
    width = max(map(len, rows))
    padded = [row + [Placed(PAD, 0, 0)] * (width - len(row)) for row in rows]
    tensors = dict(zip(("input_ids", "position_ids", "segments"), torch.tensor(padded).unbind(-1), strict=True))
    if layout != "shared":
        del tensors["segments"]
    tensors |= _answers(known, width) | _pairs(groups)
    if references is not None:
        tensors["reference"] = torch.tensor(references)
    if kl is not None:
        tensors["kl"] = torch.tensor(kl)
    num_tokens = sum(map(len, rows))
    return MicroBatch(tensors, {POLICY: float(len(groups)) if weight is None else weight}, num_tokens)


def _answers(known: list[tuple[int, int, int, list[int]]], width: int) -> dict[str, Tensor]:
    counted, targets, owners, ends = [], [], [], []
    for owner, (row, before, last, tokens) in enumerate(known):
        first = last - len(tokens) + 1
        counted += [row * width + column for column in (before, *range(first, last))]
        targets += tokens
        owners += [owner] * len(tokens)
        ends.append(row * width + last)
    lists = {"counted": counted, "targets": targets, "owners": owners, "ends": ends, "numbers": [*range(len(known))]}
    return {name: torch.tensor(values) for name, values in lists.items()}


def _pairs(groups: Sequence[Group]) -> dict[str, Tensor]:
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    margins: list[float] = []
    first = 0
    for group in groups:
        num = len(group.answers)
        mine = [(i, j) for i in range(num) for j in range(num) if group.levels[i] < group.levels[j]]
        pairs += [(first + i, first + j) for i, j in mine]
        weights += [1 / len(mine) for _ in mine]
        margins += [group.margin] * len(mine)
        first += num
    return {
        "levels": torch.tensor([float(level) for group in groups for level in group.levels]),
        "pairs": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        "pair_weights": torch.tensor(weights),
        "margins": torch.tensor(margins),
    }


def drawn_steps(num: int, labels: dict[int, float], seed: int = 0) -> tuple[list[int], dict[int, float]]:
    """`num` random tokens, and the labels of the steps that end at some of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (num,), generator=generator).tolist(), labels


def steps_laid_out(answers: Sequence[tuple[list[int], dict[int, float]]], packed: bool = False) -> MicroBatch:
    """A micro-batch of answers in steps, all in one row or each in its own."""
    rows = [answers] if packed else [[answer] for answer in answers]
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    tokens = torch.full((len(rows), width), PAD)
    positions = torch.zeros_like(tokens)
    counted: list[int] = []
    labels: list[float] = []
    for number, row in enumerate(rows):
        column = 0
        for ids, steps in row:
            tokens[number, column : column + len(ids)] = torch.tensor(ids)
            positions[number, column : column + len(ids)] = torch.arange(len(ids))
            counted += [number * width + column + place for place in steps]
            labels += steps.values()
            column += len(ids)
    tensors = {"input_ids": tokens, "position_ids": positions}
    tensors |= {"counted": torch.tensor(counted), "labels": torch.tensor(labels)}
    return MicroBatch(tensors, {POLICY: float(len(labels))}, sum(len(ids) for ids, _ in answers))


def without_weight(micro: MicroBatch) -> MicroBatch:
    """The same rows, of which nothing counts: what fills up a rank."""
    rows = ("input_ids", "position_ids", "segments", "kl")
    tensors = {name: tensor if name in rows else tensor[:0] for name, tensor in micro.tensors.items()}
    return MicroBatch(tensors, {POLICY: 0.0}, 0)


def slow_logprobs(decoder: Decoder, groups: Sequence[Group]) -> list[Tensor]:
    """Log-probabilities of each token of each answer, from the whole logits of a row of its own."""
    found = []
    for group in groups:
        for answer in group.answers:
            ids = torch.tensor([group.prompt + answer])
            logp = decoder.hf(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            first = len(group.prompt)
            found.append(logp[0, first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1))
    return found


def slow_scores(decoder: Decoder, groups: Sequence[Group]) -> list[Tensor]:
    """The score of each answer, by transformers' own forward of a row of its own."""
    rows = [torch.tensor([group.prompt + answer]) for group in groups for answer in group.answers]
    return [decoder.hf(input_ids=ids, use_cache=False).logits[0, 0] for ids in rows]


def scorer(architecture: str = "llama", num_labels: int = 1, **fields: Any) -> Decoder:
    """A tiny model with a head of one score, or of two labels for each token."""
    torch.manual_seed(0)
    shape = tiny.LLAMA if architecture == "llama" else {}
    config = AutoConfig.for_model(
        architecture,
        **({"vocab_size": tiny.VOCABULARY, "pad_token_id": PAD, "num_labels": num_labels} | shape | fields),
    )
    kind = AutoModelForSequenceClassification if num_labels == 1 else AutoModelForTokenClassification
    return Decoder(kind.from_config(config, dtype=torch.float32), head="score")


def loss_and_gradients(model: nn.Module, output: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss sum, and its gradient by each parameter; gradients are zeroed before and after."""
    model.zero_grad()
    output.sums[POLICY].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.sums[POLICY].detach(), gradients


def assert_same(
    one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], rtol: float = 1e-5
) -> None:
    """Loss sums, and each gradient up to `rtol` of its largest element."""
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=0)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = other[1][name].abs().max().item()
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=rtol * scale + 1e-12, msg=name)
