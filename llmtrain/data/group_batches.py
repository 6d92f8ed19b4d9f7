"""Micro-batches of groups of answers; the tensors that preference algorithms read.

    input_ids, position_ids  int64 [B, T]
    segments                 int64 [B, T], where prompts are shared: 0 for padding, 256 g for the prompt of the row's
                             g-th group (from 1), 256 g + k for its k-th answer; see `models/attention.py`
    counted, targets         int64 [N]: the flat position that predicts a token of an answer, and that token
    owners                   int64 [N]: which of the A answers of the micro-batch it is of, not falling
    ends                     int64 [A]: the flat position of each answer's last token
    levels                   float32 [A]: rank, less is better; of labelled answers 0 good, 1 bad
    pairs                    int64 [P, 2]: (better, worse) of each two answers of a group whose levels differ
    pair_weights, margins    float32 [P]: 1 / pairs of the group; how far apart scores shall be
    numbers                  int64 [A]: of the answers in their half of the data

The weight is the number of groups. Answers in steps have `counted` [N], where steps are judged, and `labels`
float32 [N]; their weight is N.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.counted_random import Int64Array
from llmtrain.data.group_rows import Group, Layout
from llmtrain.models.attention import SEGMENTS_A_GROUP

LEAST_LENGTH = 2  # of a row: models were not made for less


@dataclass
class _Sheet:
    """Rows as they are filled.

    Attributes:
        rows: of each row, token ids, position ids and segments so far.
    """

    rows: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    def new_row(self) -> None:
        self.rows.append(([], [], []))

    def put(self, tokens: Int64Array, position: int, segment: int) -> int:
        """Puts tokens at the end of the last row; returns the column of the first."""
        ids, positions, segments = self.rows[-1]
        column = len(ids)
        ids += tokens.tolist()
        positions += range(position, position + len(tokens))
        segments += [segment] * len(tokens)
        return column

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _, _ in self.rows)

    def tensors(self, length: int | None, pad_id: int) -> tuple[int, dict[str, Tensor]]:
        """The length T of the rows, by default that of the longest, and [B, T] each; padding is one more document."""
        longest = max(LEAST_LENGTH, max(len(ids) for ids, _, _ in self.rows))
        length = length or longest
        ids = np.full((len(self.rows), length), pad_id, np.int64)
        positions, segments = np.empty_like(ids), np.zeros_like(ids)
        for row, (tokens, places, parts) in enumerate(self.rows):
            num = len(tokens)
            ids[row, :num], positions[row, :num], segments[row, :num] = tokens, places, parts
            positions[row, num:] = np.arange(length - num)
        arrays = {"input_ids": ids, "position_ids": positions, "segments": segments}
        return length, {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass
class _Answers:
    """What is known of the answers of a micro-batch; columns are of rows until the width is known."""

    counted: list[tuple[int, Int64Array]] = field(default_factory=list)  # (row, columns)
    targets: list[Int64Array] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    def add(self, row: int, before: int, column: int, tokens: Int64Array, learnt: np.ndarray) -> None:
        """An answer from `column` on; `before` is the column that predicts its first token, -1 for none."""
        columns = np.arange(column - 1, column - 1 + len(tokens))
        columns[:1] = before
        predicted = learnt & (columns >= 0)
        self.counted.append((row, columns[predicted]))
        self.targets.append(tokens[predicted])
        self.ends.append((row, column + len(tokens) - 1))


@dataclass(frozen=True)
class GroupCollator:
    """Makes micro-batches of rows of groups.

    Attributes:
        length: of a row; padded ones are cut to the longest.
    """

    layout: Layout
    length: int
    pad_id: int

    def collate(self, rows: Sequence[list[Group]], positions: Int64Array, ragged: bool) -> MicroBatch:
        """A micro-batch; `positions`, of the rows in the order, matter to no loss of preferences."""
        sheet, answers = _Sheet(), _Answers()
        groups = [group for row in rows for group in row]
        for row in rows:
            if self.layout != "padded":
                sheet.new_row()
            for number, group in enumerate(row, start=1):
                self._put(sheet, answers, group, number)
        length, tensors = sheet.tensors(None if ragged else self.length, self.pad_id)
        if self.layout != "shared":
            del tensors["segments"]
        tensors |= _of_answers(answers, length) | _of_groups(groups)
        return MicroBatch(tensors, {POLICY: float(len(groups))}, sheet.num_tokens)

    def _put(self, sheet: _Sheet, answers: _Answers, group: Group, number: int) -> None:
        num = len(group.prompt)
        prompt_end = sheet.put(group.prompt, 0, number * SEGMENTS_A_GROUP) + num - 1 if self.layout == "shared" else 0
        for answer, (tokens, learnt) in enumerate(zip(group.answers, group.learnt, strict=True), start=1):
            if self.layout == "padded":
                sheet.new_row()
            if self.layout != "shared":
                prompt_end = sheet.put(group.prompt, 0, 0) + num - 1
            column = sheet.put(tokens, num, number * SEGMENTS_A_GROUP + answer)
            answers.add(len(sheet.rows) - 1, prompt_end if num else -1, column, tokens, learnt)

    @staticmethod
    def without_weight(micro: MicroBatch) -> MicroBatch:
        """A micro-batch of the same rows in which nothing counts."""
        empty = {name: tensor[:0] for name, tensor in micro.tensors.items() if name not in _ROWS}
        return MicroBatch({**micro.tensors, **empty}, {POLICY: 0.0}, 0)


_ROWS = ("input_ids", "position_ids", "segments")


def _of_answers(answers: _Answers, length: int) -> dict[str, Tensor]:
    counted = [row * length + columns for row, columns in answers.counted]
    owners = np.repeat(np.arange(len(counted)), [len(columns) for columns in counted])
    ends = [row * length + column for row, column in answers.ends]
    arrays = {
        "counted": np.concatenate(counted),
        "targets": np.concatenate(answers.targets),
        "owners": owners,
        "ends": np.array(ends, np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _of_groups(groups: Sequence[Group]) -> dict[str, Tensor]:
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    margins: list[float] = []
    numbers: list[int] = []
    first = 0
    for group in groups:
        levels, grades = group.values[:, 0].tolist(), group.values[:, 1].tolist()
        mine = [(i, j) for i, j in combinations(range(len(levels)), 2) if levels[i] < levels[j]]
        pairs += [(first + i, first + j) for i, j in mine]
        weights += [1.0 / len(mine) for _ in mine]
        margins += [grades[i] - grades[j] for i, j in mine]
        numbers += range(group.first, group.first + len(group.answers))
        first += len(group.answers)
    return {
        "levels": torch.from_numpy(np.concatenate([group.values[:, 0] for group in groups])),
        "pairs": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        "pair_weights": torch.tensor(weights),
        "margins": torch.tensor(margins),
        "numbers": torch.tensor(numbers, dtype=torch.int64),
    }


@dataclass(frozen=True)
class StepCollator:
    """Makes micro-batches of rows of answers in steps.

    Attributes:
        length: of a row; padded ones are cut to the longest.
    """

    length: int
    pad_id: int

    def collate(self, rows: Sequence[list[Group]], positions: Int64Array, ragged: bool) -> MicroBatch:
        sheet = _Sheet()
        counted: list[tuple[int, Int64Array]] = []
        for number, row in enumerate(rows):
            sheet.new_row()
            for group in row:
                column = sheet.put(group.answers[0], 0, 0)
                counted.append((number, column + np.flatnonzero(group.learnt[0])))
        length, tensors = sheet.tensors(None if ragged else self.length, self.pad_id)
        del tensors["segments"]
        tensors["counted"] = torch.from_numpy(np.concatenate([row * length + columns for row, columns in counted]))
        labels = [group.values[:, 0] for row in rows for group in row]
        tensors["labels"] = torch.from_numpy(np.concatenate(labels))
        return MicroBatch(tensors, {POLICY: float(len(tensors["labels"]))}, sheet.num_tokens)

    @staticmethod
    def without_weight(micro: MicroBatch) -> MicroBatch:
        """A micro-batch of the same rows in which nothing counts."""
        return GroupCollator.without_weight(micro)
