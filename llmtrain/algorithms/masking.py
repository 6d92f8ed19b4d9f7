"""Which tokens are masked, how much each counts, and the loss on them: what masked and block diffusion share.

A unit is what has a noise level of its own: a document of a packed row, or a block. Every number is a pure
function of (seed, position in the data order, unit or place in the row), so that noise replays after a resume,
and is the same for every world size and micro-batch. A position is step * sequences + row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.data.counted_random import Float64Array, Int64Array, uniforms
from llmtrain.data.order import permutation_index
from llmtrain.data.packing import PADDING
from llmtrain.models.attention import Visible
from llmtrain.models.loss_head import bias_without, linear_cross_entropy, linear_rowwise

BoolArray = npt.NDArray[np.bool_]

GOLDEN = (5**0.5 - 1) / 2  # multiples of it fill [0, 1) evenly, however many there are


class Rows(NamedTuple):
    """A micro-batch's rows as arrays [B, T], before noise; `positions` [B]. Fields as in data/packing.py's Row."""

    input_ids: Int64Array
    position_ids: Int64Array
    document_ids: Int64Array
    trained: BoolArray
    positions: Int64Array


class Masking(NamedTuple):
    """Arrays [B, T]: which tokens are masked, and what the loss of each masked one counts."""

    masked: BoolArray
    weights: Float64Array


def rows_of(micro: MicroBatch, mask_id: int | None, *, shift: bool) -> Rows:
    """The rows that the loader made.

    Not trained are, beside what the data says, tokens that are the mask itself, which no model can predict,
    and with `shift` the first one of each document and row, which has no place before it.
    """
    rows = Rows(*(micro.tensors[name].numpy() for name in Rows._fields))
    trained = rows.trained if mask_id is None else rows.trained & (rows.input_ids != mask_id)
    if shift:
        trained = trained & (rows.position_ids > 0)
    return rows._replace(trained=trained)


def stratified(seed: int, positions: Int64Array, sequences: int, num_units: int, units_a_row: int) -> Float64Array:
    """t in [0, 1) of each unit, [B, num_units]: each uniform, and together even over the global batch of a step.

    The global batch has sequences * units_a_row strata, which go to its units in random order (in the order of
    the units, the early blocks of a row would always have little noise). Units beyond units_a_row take the
    strata of the first ones again, moved by multiples of the golden ratio.

    Args:
        positions: [B], of the rows in the data order.
        sequences: rows in the global batch.
        num_units: at most so many in a row of this micro-batch.
        units_a_row: of a usual row; a constant of the run.
    """
    step, row = np.divmod(positions[:, None], sequences)
    turn, unit = np.divmod(np.arange(num_units)[None, :], units_a_row)
    num = sequences * units_a_row
    stratum = permutation_index(row * units_a_row + unit, num, seed, step)
    t: Float64Array = (uniforms(seed, "strata", step) + stratum / num + GOLDEN * turn) % 1.0
    return t


def bernoulli(seed: int, rows: Rows, rates: Float64Array) -> Masking:
    """Masks each trained token with its own probability `rates` [B, T]; a masked one counts 1 / rate."""
    numbers = uniforms(seed, "mask", rows.positions[:, None], np.arange(rows.input_ids.shape[1])[None, :])
    return Masking(rows.trained & (numbers < rates), 1.0 / rates)


def exact_count(seed: int, rows: Rows, units: Int64Array, t: Float64Array) -> Masking:
    """Masks l = 1 + floor(n t) of each unit's n trained tokens, all sets of l alike; a masked one counts n / l.

    With t uniform this is an unbiased estimate of the bound, and its weights are bounded (LLaDA, arXiv
    2502.09992, equation 6).

    Args:
        units: [B, T], the unit of each token, from 0 in each row.
        t: [B, U].
    """
    num_rows, length = units.shape
    unit = (np.arange(num_rows)[:, None] * t.shape[1] + np.maximum(units, 0)).ravel()
    trained = rows.trained.ravel()
    sizes = np.bincount(unit[trained], minlength=t.size)
    counts = 1 + np.minimum(np.floor(sizes * t.ravel()), sizes - 1).astype(np.int64)
    numbers = uniforms(seed, "order", rows.positions[:, None], np.arange(length)[None, :]).ravel()
    # Trained tokens, unit by unit, in random order: the first l of a unit are masked.
    where = np.flatnonzero(trained)
    where = where[np.lexsort((numbers[where], unit[where]))]
    rank = np.arange(len(where)) - (np.cumsum(sizes) - sizes)[unit[where]]
    masked = np.zeros(unit.shape, np.bool_)
    masked[where[rank < counts[unit[where]]]] = True
    weights = (sizes / np.maximum(counts, 1))[unit]
    return Masking(masked.reshape(units.shape), weights.reshape(units.shape))


def documents_in(rows: Rows) -> int:
    """The most documents in a row, padding not counted."""
    return int(rows.document_ids.max(initial=0)) + 1


def of_documents(values: Float64Array, rows: Rows) -> Float64Array:
    """[B, D] of documents as [B, T] of their tokens."""
    return np.take_along_axis(values, np.maximum(rows.document_ids, 0), axis=1)


def per_document(rows: Rows) -> tuple[Float64Array, int]:
    """[B, T]: one over the number of trained tokens in the token's document; and how many documents have some."""
    num_rows = len(rows.input_ids)
    num = documents_in(rows)
    document = np.arange(num_rows)[:, None] * num + np.maximum(rows.document_ids, 0)
    sizes = np.bincount(document[rows.trained], minlength=num_rows * num)
    return (1.0 / np.maximum(sizes, 1))[document], int((sizes > 0).sum())


def micro_batch(
    rows: Rows, ids: Int64Array, masking: Masking, heads: Int64Array, num_counted: float, num_tokens: int
) -> MicroBatch:
    """What one forward works on.

    Args:
        ids: [B, T'] tokens as the model is to see them.
        heads: [B, T], where in the flattened [B, T'] the prediction of each token is read.
        num_counted: weight of the micro-batch.
    """
    where = np.flatnonzero(masking.masked)
    arrays = {
        "input_ids": ids,
        "targets": rows.input_ids.ravel()[where],
        "heads": heads.ravel()[where],
        "row_weights": masking.weights.ravel()[where].astype(np.float32),
        "positions": rows.positions,
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return MicroBatch(tensors, {POLICY: num_counted}, num_tokens)


def weighted_nll(model: nn.Module, micro: MicroBatch, visible: Visible, mask_id: int) -> LossOutput:
    """Sum over masked tokens of weight * -log p(token), in nats; the mask itself has no probability."""
    tensors = micro.tensors

    def head_loss(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows = hidden.flatten(0, 1).index_select(0, tensors["heads"])
        bias = bias_without(head, mask_id)
        return linear_cross_entropy(rows, head.weight, tensors["targets"], bias, tensors["row_weights"])

    loss: Tensor = model(tensors["input_ids"], tensors["position_ids"], head_loss, visible)
    return LossOutput({POLICY: loss})


def of_logits(
    model: nn.Module,
    micro: MicroBatch,
    visible: Visible,
    mask_id: int | None,
    function: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """`function` of the logits [n, V] of tokens that are predicted and which ones they are; see `linear_rowwise`.

    Args:
        mask_id: has no probability.
    """
    tensors = micro.tensors

    def head_values(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows = hidden.flatten(0, 1).index_select(0, tensors["heads"])
        bias = head.bias if mask_id is None else bias_without(head, mask_id)
        return linear_rowwise(rows, head.weight, bias, function)

    values: Tensor = model(tensors["input_ids"], tensors["position_ids"], head_values, visible)
    return values


def cropped(seed: int, rows: Rows, share: float, pad_id: int) -> Rows:
    """The rows, of which a `share` is cut to a random length (LLaDA: so that the model knows all lengths)."""
    length = rows.input_ids.shape[1]
    chosen = uniforms(seed, "crop", rows.positions) < share
    # Of the row's own tokens: to how many columns its micro-batch is padded shall not matter.
    own = (rows.document_ids != PADDING).sum(axis=1)
    keep = np.where(chosen, 1 + np.floor(uniforms(seed, "length", rows.positions) * own).astype(np.int64), length)
    place = np.arange(length)[None, :]
    gone = place >= keep[:, None]
    return Rows(
        np.where(gone, pad_id, rows.input_ids),
        np.where(gone, place - keep[:, None], rows.position_ids),
        np.where(gone, PADDING, rows.document_ids),
        rows.trained & ~gone,
        rows.positions,
    )
