"""Log-probabilities of answers under the reference, the model as training finds it, computed once and kept.

They lie in the run directory, in reference.safetensors with the fingerprints of the data and of the weights that the
model begins with. A run that goes on from a checkpoint reads them, since its model is no longer the reference. One that
begins again reads them if data and weights are those still. One that never began to train computes them anew: its
recipe may be another by then.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain import distributed
from llmtrain.algorithms.answers import answer_logprobs
from llmtrain.contracts import Engine, MicroBatch, Phase
from llmtrain.data.group_rows import GroupRows, MismatchedRows
from llmtrain.data.loader import Collator, all_batches
from llmtrain.data.progress import row_progress
from llmtrain.directories import fsync_path
from llmtrain.distributed import World
from llmtrain.errors import InputError, TrainingError
from llmtrain.recipe.resolved import RESOLVED

log = logging.getLogger(__name__)

FILE = "reference.safetensors"


@dataclass(frozen=True)
class Half:
    """Rows of one half of the data, by the name that their log-probabilities are kept under."""

    name: str
    rows: Sequence[GroupRows]
    mismatched: bool = False  # whether those of mismatched answers are needed (KTO)

    @property
    def num_answers(self) -> int:
        return sum(rows.num_answers for rows in self.rows)


def with_reference(micro: MicroBatch, logprobs: Tensor) -> MicroBatch:
    """The micro-batch with the reference's log-probabilities of its answers, of all those of its half."""
    reference = logprobs[micro.tensors["numbers"]]
    return MicroBatch({**micro.tensors, "reference": reference}, micro.weights, micro.num_tokens)


@dataclass(frozen=True)
class Reference:
    """Computes or reads log-probabilities under the reference.

    Attributes:
        engine: whose model is the reference still.
        directory: of the run.
        fingerprint: of the data.
        weights: gives the hash of the weights that the model begins with.
        frozen: whether there are weights that are not trained, which checkpoints do not hold.
        micro_sequences: rows in a micro-batch.
    """

    engine: Engine
    world: World
    phases: Phase
    collator: Collator
    directory: Path
    fingerprint: dict[str, str]
    weights: Callable[[], str]
    frozen: bool
    micro_sequences: int

    def logprobs(self, halves: Sequence[Half]) -> dict[str, Tensor]:
        """float32 [answers] by name of the half; those of mismatched answers by that name and "-mismatched".

        Raises:
            InputError: those that are there are damaged, or of other data or weights than the run can go on with.
            TrainingError: the disk is full.
        """
        kept = distributed.of_main(self._read, self.world)
        if kept is not None:
            return kept
        weights = distributed.of_main(self.weights, self.world)  # now: they may be others when it is done
        log.info("computing log-probabilities under the reference, once")
        made: dict[str, Tensor] = {}
        for half in halves:
            made[half.name] = self._computed(half, half.rows)
            if half.mismatched:
                made[f"{half.name}-mismatched"] = self._computed(half, [MismatchedRows(rows) for rows in half.rows])
        if self.world.is_main:
            self._write(made, weights)
        return made

    def _computed(self, half: Half, rows: Sequence[GroupRows | MismatchedRows]) -> Tensor:
        values = np.zeros(half.num_answers)
        if not rows:
            return torch.from_numpy(values).float()
        micros = all_batches(rows, self.micro_sequences, self.world.rank, self.world.size, self.collator)
        mine = -(-sum(len(source) for source in rows) // self.world.size)
        with row_progress(f"reference, {half.name}", mine) as progress, self.engine.evaluating(averaged=False):
            for micro in micros:
                with self.phases("compute"):
                    logprobs = answer_logprobs(self.engine.model, micro.to(self.engine.device))
                values[micro.tensors["numbers"].numpy()] = logprobs.double().cpu().numpy()
                progress.advance(len(micro.tensors["input_ids"]))
        return torch.from_numpy(distributed.sum_array(values)).float()

    def _data(self) -> str:
        return json.dumps(self.fingerprint, sort_keys=True)

    def _read(self) -> dict[str, Tensor] | None:
        file = self.directory / FILE
        if not (file.is_file() and (self.directory / RESOLVED).is_file()):
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                goes_on = any((self.directory / "checkpoints").glob("step-*"))
                changed = self._changed(opened.metadata() or {}, goes_on)
                if changed is None:
                    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        except SafetensorError as error:
            raise InputError(
                f"cannot be read: {error}", where=str(file), remedy="start a new run with another name=..."
            ) from None
        what = f"{changed} changed since the log-probabilities under the reference were computed"
        if goes_on:
            raise InputError(
                what,
                where=str(file),
                remedy=f"bring the former {changed.split()[-1]} back, or start a new run with another name=...",
            )
        log.warning("%s, and the run begins again", what)
        return None

    def _changed(self, kept: Mapping[str, str], goes_on: bool) -> str | None:
        """What is not as it was when they were computed."""
        if kept.get("data") != self._data():
            return "the data"
        # A checkpoint holds all that is trained, whatever became of the files that it began with.
        if (self.frozen or not goes_on) and kept.get("weights") != self.weights():
            return "the model's weights"
        return None

    def _write(self, made: dict[str, Tensor], weights: str) -> None:
        file = self.directory / FILE
        aside = file.with_name(f".writing-{FILE}")
        try:
            save_file(made, aside, {"data": self._data(), "weights": weights})
            fsync_path(aside)
            os.replace(aside, file)
            fsync_path(self.directory)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise TrainingError(f"{file} cannot be written: {reason}\n  remedy: make room") from error
