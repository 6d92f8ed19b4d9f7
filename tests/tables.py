"""Models so small that every text and mask can be counted: tables of conditional probabilities, and tiny decoders.

What is computed here is computed by the definition, to be compared with the estimators.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmtrain.algorithms.masking import Rows
from llmtrain.evaluation.likelihood import Predict, Predicted, of_decoder, units_of
from llmtrain.models.attention import Visible, dense
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from tests import tiny

V, L = 3, 4
MASK = V  # one more than the tokens
TEXTS = np.asarray(list(itertools.product(range(V), repeat=L)))

# ---------------------------------------------------------------------------------------- toys


def some_distribution(seed: int = 0) -> Tensor:
    """p of every text, [V] * L, far from independent."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn([V] * L, generator=random, dtype=torch.float64).mul(1.5).flatten().softmax(0).view([V] * L)


def conditionals(p: Tensor) -> Tensor:
    """log p(x_i = v | what is there), [(V + 1) ** L, L, V + 1], of every canvas of tokens and masks."""
    table = torch.zeros((V + 1) ** L, L, V + 1, dtype=torch.float64)
    for number, canvas in enumerate(itertools.product(range(V + 1), repeat=L)):
        for place in range(L):
            index = [slice(None) if token == MASK or i == place else token for i, token in enumerate(canvas)]
            kept = p[tuple(index)]
            dim = sum(isinstance(i, slice) for i in index[:place])
            masses = kept.sum([d for d in range(kept.dim()) if d != dim]) if kept.dim() > 1 else kept
            table[number, place, :V] = (masses / masses.sum()).log()
    return table


def any_answers(seed: int = 0) -> Tensor:
    """As `conditionals`, of a model whose answers fit no distribution of texts."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn((V + 1) ** L, L, V + 1, generator=random, dtype=torch.float64).mul(1.5)


POWERS = (V + 1) ** np.arange(L - 1, -1, -1)


def by_table(table: Tensor) -> Callable[[Tensor], Tensor]:
    """The table as a model: ids [B, L] to logits [B, L, V + 1]."""
    return lambda ids: table[(ids * torch.from_numpy(POWERS)).sum(1)]


def of_model(model: Callable[[Tensor], Tensor], mask_id: int) -> Predict:
    """A model that is a function of token ids [B, T] with masks to logits [B, T, V], where row i predicts token i."""

    def predict(rows: Rows, masked: Any, asked: Any = None) -> Predicted:
        ids, places = torch.from_numpy(rows.input_ids), torch.from_numpy(masked if asked is None else asked)
        logits = model(ids.masked_fill(torch.from_numpy(masked), mask_id))[places].double()
        logits[:, mask_id] = -torch.inf
        logprobs = logits.log_softmax(1)
        return Predicted(logprobs.gather(1, ids[places][:, None])[:, 0], logprobs.amax(1).exp())

    return predict


class TableDecoder(nn.Module):
    """The table behind the interface of `Decoder`: a token knows the other tokens that it attends to, and no others."""

    def __init__(self, table: Tensor, *, shift: bool):
        super().__init__()
        self._table, self._shift = table.float(), int(shift)
        self._head = nn.Linear(V + 1, V + 1, bias=False)
        with torch.no_grad():
            self._head.weight.copy_(torch.eye(V + 1))

    def forward(self, input_ids: Tensor, position_ids: Tensor, head: Any, visible: Visible) -> Tensor:
        seen = dense(visible, len(input_ids), input_ids.shape[1], input_ids.shape[1], torch.device("cpu")).squeeze(1)
        place = position_ids.clamp_max(L - 1)
        known = (input_ids - MASK) * torch.from_numpy(POWERS)[place]  # nothing of a mask
        canvas = ((V + 1) ** L - 1) + (seen * known.unsqueeze(1)).sum(2)
        predicted = (place + self._shift).clamp_max(L - 1)
        hidden: Tensor = head(self._table[canvas.clamp_min(0), predicted], self._head)
        return hidden


def rows_of(texts: Any, counted_from: int = 0, keys: Any = None) -> Rows:
    ids = np.asarray(texts, dtype=np.int64)
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return Rows(
        ids, place, np.zeros_like(ids), place >= counted_from, np.arange(len(ids)) if keys is None else np.asarray(keys)
    )


# ------------------------------------------------------------------------------- by definition


def nats(table: Tensor, text: Sequence[int], known: Sequence[int], place: int) -> float:
    """-log p(x_place | the known places)."""
    canvas = np.full(L, MASK)
    canvas[list(known)] = np.asarray(text)[list(known)]
    logits = table[int(canvas @ POWERS), place, :V]
    return -float(logits.log_softmax(0)[text[place]])


def any_order(
    table: Tensor, text: Sequence[int], places: Sequence[int], before: Sequence[int], blind: int | None = None
) -> float:
    """-log p of the places, one after another, on average over all their orders; `blind` sees only those before."""
    total, orders = 0.0, list(itertools.permutations(places))
    for order in orders:
        for k, place in enumerate(order):
            total += nats(table, text, before if place == blind else [*before, *order[:k]], place)
    return total / len(orders)


def by_definition(table: Tensor, text: Sequence[int], block_size: int | None, shift: bool) -> float:
    """With shift a text's first token is given, and a block's first one is predicted by a row that does not see it."""
    size = block_size or L
    total = 0.0
    for start in range(0, L, size):
        places = [place for place in range(start, min(start + size, L)) if place >= int(shift)]
        total += any_order(table, text, places, range(places[0]), start if shift else None) if places else 0.0
    return total


def enumerated(predict: Predict, text: Sequence[int], block_size: int | None, first: int = 0) -> float:
    """The bound's expectation over l and over the sets of l tokens, all of them, from the model's own forwards."""
    rows = rows_of([text], first)
    units = units_of(rows, block_size)
    sets, weights = [], []
    for unit in np.unique(units[rows.trained]):
        places = np.flatnonzero((units[0] == unit) & rows.trained[0])
        for num in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, num):
                sets.append(np.isin(np.arange(len(text)), chosen))
                # 1 / L for l, one of C(L, l) sets, and the weight L / l of each masked token
                weights.append(1 / math.comb(len(places), num) / num)
    masked = np.stack(sets)
    many = rows_of([text] * len(sets), first)
    said = -predict(many, masked).logprobs.double().numpy()
    return float((said * np.asarray(weights)[np.nonzero(masked)[0]]).sum())


FORMS = [
    pytest.param(block_size, shift, id=f"{block_size or 'masked'}{'-shift' if shift else ''}")
    for block_size in (None, 1, 2, 3, L)
    for shift in (False, True)
]


def form(table: Tensor, block_size: int | None, shift: bool) -> tuple[Predict, int]:
    """The table as a model of this form; and the first place that is counted: with shift none is before the first."""
    diffusion = Diffusion("masked" if block_size is None else "block", MASK, shift, block_size)
    return of_decoder(TableDecoder(table, shift=shift), diffusion), int(shift)


def logp_after(p: Tensor, first: int) -> Any:
    """log p of every text after its first tokens, which are given."""
    given = [p[tuple(text[:first])].sum() if first else 1.0 for text in TEXTS]
    return np.log([float(p[tuple(text)] / mass) for text, mass in zip(TEXTS, given, strict=True)])


# ------------------------------------------------------------------------------- real decoders

WORDS = 5  # the last is the mask
SMALL: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "eos_token_id": None}


def real(seed: int = 0) -> Decoder:
    decoder = tiny.decoder(seed=seed, **SMALL).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6)  # so that it has opinions
    return decoder


def of_real(block_size: int | None, shift: bool, seed: int = 0) -> Predict:
    diffusion = Diffusion("masked" if block_size is None else "block", WORDS - 1, shift, block_size)
    return of_decoder(real(seed), diffusion)


ALL = np.asarray([(0, *text) for text in itertools.product(range(WORDS - 1), repeat=3)])  # after a given first token
