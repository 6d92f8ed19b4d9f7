"""Micro-batches in which a model in training writes some of the answers itself.

Rows are drawn from the data's by (seed, position in the data order). Of such a row, each document's prompt is what is
before its first trained token. The answer depends on (seed, position, number of the document) and on the weights: so
a resumed run, and one on another number of ranks, trains on the same texts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from llmtrain import distributed
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.counted_random import uniforms
from llmtrain.data.hashing import derive_seed
from llmtrain.data.loader import Loader
from llmtrain.data.packing import IGNORE_INDEX, PADDING, BoolArray
from llmtrain.distributed import World

# The answers to prompts, with a seed for each.
Writer = Callable[[list[list[int]], list[int]], list[list[int]]]


class Prompt(NamedTuple):
    """What the student is to answer, and the seed of its random numbers."""

    ids: list[int]
    seed: int


class OnPolicy:
    """Micro-batches in which the student writes the answers of a share of the rows.

    Args:
        share: of the rows.
        loader: gives the data's rows.
        writer: answers prompts, with seeds; all ranks call it once in a step.
        longest: tokens of a prompt and its answer.
        micro_tokens: of a micro-batch of answers, padding counted.
        pad_id: what fills them up.
    """

    def __init__(
        self,
        share: float,
        seed: int,
        loader: Loader,
        writer: Writer,
        longest: int,
        micro_tokens: int,
        pad_id: int,
        world: World,
    ):
        self._share, self._seed, self._loader, self._writer = share, seed, loader, writer
        self._longest, self._micro_tokens, self._pad_id, self._world = longest, micro_tokens, pad_id, world

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step`; all ranks have equally many."""
        batches: list[MicroBatch] = []
        prompts: list[Prompt] = []
        for micro in self._loader.micro_batches(step):
            drawn = uniforms(self._seed, "on_policy", micro.tensors["positions"].numpy()) < self._share
            of_rows = [self._prompts(micro, row) if drawn[row] else [] for row in range(len(drawn))]
            prompts += [prompt for asked in of_rows for prompt in asked]
            # A row without a prompt (it is the middle of a long answer) is still the data's.
            batches += without(micro, np.array([bool(asked) for asked in of_rows]))
        answers = self._writer([prompt.ids for prompt in prompts], [prompt.seed for prompt in prompts])
        batches += self._of_answers([prompt.ids for prompt in prompts], answers)
        rank, size = self._world.rank, self._world.size
        most = max(distributed.sum_scalars([float(len(batches)) * (rank == other) for other in range(size)]))
        return batches + [self._filler()] * (int(most) - len(batches))

    def _prompts(self, micro: MicroBatch, row: int) -> list[Prompt]:
        ids, documents, trained = (micro.tensors[name][row] for name in ("input_ids", "document_ids", "trained"))
        position = int(micro.tensors["positions"][row])
        prompts = []
        for document in range(int(documents.max()) + 1):
            here = documents == document
            answers = trained[here].nonzero()
            # A document whose first token is trained goes on from the row before: what is asked is not here.
            if len(answers) and 0 < (num := int(answers[0])) < self._longest:
                prompts.append(Prompt(ids[here][:num].tolist(), derive_seed(self._seed, "answer", position, document)))
        return prompts

    def _of_answers(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[MicroBatch]:
        """Each prompt with its answer as a row; rows of like lengths in a micro-batch."""
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]) - len(answers[row]))
        batches = []
        while order:
            width = len(prompts[order[0]]) + len(answers[order[0]])
            num = max(1, self._micro_tokens // width)
            batches.append(answered([(prompts[row], answers[row]) for row in order[:num]], self._pad_id))
            order = order[num:]
        return batches

    def _filler(self) -> MicroBatch:
        """A micro-batch in which nothing counts."""
        ids = torch.full((1, 2), self._pad_id)
        tensors = {
            "input_ids": ids,
            "position_ids": torch.arange(2)[None],
            "counted": torch.empty(0, dtype=torch.int64),
        }
        return MicroBatch(tensors, {POLICY: 0.0}, 0)


def without(micro: MicroBatch, left_out: BoolArray) -> list[MicroBatch]:
    """The micro-batch without some rows, bool [B]; none where no row is left."""
    if not left_out.any():
        return [micro]
    if left_out.all():
        return []
    keep = torch.from_numpy(~left_out)
    tensors = {name: tensor[keep] for name, tensor in micro.tensors.items() if name != "counted"}
    tensors["counted"] = (tensors["targets"].flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    num_tokens = int((tensors["document_ids"] != PADDING).sum())
    return [MicroBatch(tensors, {POLICY: float(len(tensors["counted"]))}, num_tokens)]


def answered(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> MicroBatch:
    """A micro-batch of prompts and answers, a row each, in which the answers' tokens count."""
    # The last token of a text predicts nothing.
    inputs = [[*prompt, *answer][:-1] for prompt, answer in texts]
    width = max(len(row) for row in inputs)
    counted = [
        row * width + column
        for row, (prompt, answer) in enumerate(texts)
        for column in range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    ]
    tensors = {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in inputs]),
        "position_ids": torch.arange(width).repeat(len(inputs), 1),
        "counted": torch.tensor(counted),
    }
    return MicroBatch(tensors, {POLICY: float(len(counted))}, sum(len(row) for row in inputs))
