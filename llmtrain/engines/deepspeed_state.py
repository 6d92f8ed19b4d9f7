"""The training state of ZeRO stages 1 to 3 under names that no backend colours.

Every stage lays the trained parameters of an optimizer group one behind the other, or their parts, and
AdamW sees one flat float32 tensor of each. So a rank holds of a parameter one run of its elements: the
same run of the weight and of both moments.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.contracts import Shard
from llmtrain.distributed import World
from llmtrain.engines.deepspeed_setup import Originals
from llmtrain.engines.parts import persistent_buffers
from llmtrain.errors import TrainingError
from llmtrain.models.decoder import Decoder

_MOMENTS = ("exp_avg", "exp_avg_sq")
# What changes in DeepSpeed's dynamic loss scaler while it runs.
_LOSS_SCALER = {
    "cur_scale": torch.float32,
    "cur_iter": torch.int64,
    "last_overflow_iter": torch.int64,
    "cur_hysteresis": torch.int64,
}


@dataclass(frozen=True)
class _Fragment:
    """The run of a parameter's elements that this rank keeps.

    Attributes:
        name: of the parameter in the decoder.
        shape: of the whole parameter.
        start: index of the run's first element in the flattened parameter.
        flat: index of the flat tensor that holds the run.
        place: where it lies there.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    flat: int
    place: slice


class ZeroState:
    """What one rank keeps in a DeepSpeed engine of stage 1, 2 or 3.

    Args:
        engine: of DeepSpeed, fresh from `deepspeed.initialize`, with an AdamW without state.
        decoder: its module.
        originals: trained weights in float32 to begin with, where the engine has rounded them.
    """

    def __init__(self, engine: Any, decoder: Decoder, originals: Originals, world: World):
        self._optimizer, self._adamw = engine.optimizer, engine.basic_optimizer
        self._decoder, self._world = decoder, world
        self._stage = int(engine.zero_optimization_stage())
        self._fp16 = bool(engine.fp16_enabled())
        self._name = {parameter: name for name, parameter in decoder.named_parameters()}
        self._groups, self.flats = self._layout()
        self._fragments = list(self._cut())
        self._copies: dict[str, Tensor] = {}  # of what has no live tensor: steps, the scaler, what lies on disk
        with torch.no_grad():
            for index, flat in enumerate(self.flats):
                with self._in_memory(index, write=True):
                    self._begin(index, flat, originals)

    def _begin(self, index: int, flat: Tensor, originals: Originals) -> None:
        # Made now and not in the first step: a checkpoint is loaded by writing into the state.
        self._adamw.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{moment: torch.zeros_like(flat, requires_grad=False) for moment in _MOMENTS},
        }
        for fragment in self._of_flat(index):
            if fragment.name in originals:
                start, piece = originals[fragment.name]
                mine = flat.detach()[fragment.place]
                first = fragment.start - start
                assert first >= 0 and first + mine.numel() <= piece.numel(), "DeepSpeed has cut the weights otherwise"
                mine.copy_(piece[first : first + mine.numel()])

    # ------------------------------------------------------------------------------------ where things lie

    def _layout(self) -> tuple[list[list[tuple[Any, int]]], list[Tensor]]:
        """For each flat tensor its parameters with the places where they begin; and the flat tensors.

        A place counts from the flat tensor's first element in stage 3, from that of rank 0 in 1 and 2.
        """
        # Here, since deepspeed may only be imported once the accelerator is chosen.
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        optimizer = self._optimizer
        if self._stage == 3:
            sizes = [[p.partition_numel() for p in group] for group in optimizer.fp16_groups]
            groups, flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
        elif isinstance(optimizer, BF16_Optimizer):  # what DeepSpeed takes for stage 1 with bf16 weights
            sizes = [[p.numel() for p in group] for group in optimizer.bf16_groups]
            groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            # As they lie, which `round_robin_gradients` changes; DeepSpeed's own `_hp_mapping` does not know that.
            groups, places = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
            return [list(zip(*pair, strict=True)) for pair in zip(groups, places, strict=True)], (
                optimizer.single_partition_of_fp32_groups
            )
        starts = [list(itertools.accumulate(of_group, initial=0))[:-1] for of_group in sizes]
        return [list(zip(*pair, strict=True)) for pair in zip(groups, starts, strict=True)], flats

    def _cut(self) -> Iterator[_Fragment]:
        rank = self._world.rank
        for index, (group, flat) in enumerate(zip(self._groups, self.flats, strict=True)):
            for parameter, place in group:
                if self._stage == 3:
                    # each parameter in equal parts, the last one padded
                    size = parameter.partition_numel()
                    shape, start, begin = tuple(parameter.ds_shape), rank * size, place
                    numel = min(size, parameter.ds_numel - start)
                else:
                    # the whole row of parameters in equal parts, anywhere in a parameter
                    mine = rank * flat.numel()
                    first = max(place, mine)
                    shape, start, begin = tuple(parameter.shape), first - place, first - mine
                    numel = min(place + parameter.numel(), mine + flat.numel()) - first
                if numel > 0:
                    yield _Fragment(self._name[parameter], shape, start, index, slice(begin, begin + numel))

    def _of_flat(self, index: int) -> Iterator[_Fragment]:
        return (fragment for fragment in self._fragments if fragment.flat == index)

    def _on_disk(self, index: int) -> bool:
        return self._stage == 3 and bool(self._optimizer._swappable_optimizer_subgroup(index))

    @contextmanager
    def _in_memory(self, index: int, write: bool) -> Iterator[None]:
        """Reads a flat tensor and its state from NVMe where they lie there, and writes them back if wanted."""
        if not self._on_disk(index):
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(index)
        yield
        if write:
            self._optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            self._optimizer._release_swap_buffers(index)

    def _runs(self, fragment: _Fragment) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, live run) of a fragment's weight and moments."""
        flat = self.flats[fragment.flat]
        yield f"model.{fragment.name}", flat.detach()[fragment.place]
        for moment in _MOMENTS:
            yield f"optimizer.{fragment.name}.{moment}", self._adamw.state[flat][moment][fragment.place]

    def num_elements(self) -> int:
        """Elements of trained parameters that this rank keeps."""
        return sum(fragment.place.stop - fragment.place.start for fragment in self._fragments)

    # --------------------------------------------------------------------------------------------- checkpoints

    @torch.no_grad()
    def shards(self) -> dict[str, Shard]:
        """See `contracts.Engine.state`; with fp16 also `loss_scale.<attribute of DeepSpeed's scaler>`."""
        shards: dict[str, Shard] = {}
        self._copies.clear()
        for index in range(len(self.flats)):
            with self._in_memory(index, write=False):
                for fragment in self._of_flat(index):
                    for name, run in self._runs(fragment):
                        if self._on_disk(index):
                            self._copies[name] = run.clone()
                        shards[name] = Shard(self._copies.get(name, run), fragment.start, fragment.shape)
        for name, index in self._steps():
            self._copies[name] = self._adamw.state[self.flats[index]]["step"].cpu().clone()
        for attribute, dtype in self._scaler().items():
            value = vars(self._optimizer.loss_scaler)[attribute]
            self._copies[f"loss_scale.{attribute}"] = torch.tensor(value, dtype=dtype)
        everywhere = {name: tensor for name, tensor in self._copies.items() if name not in shards}
        everywhere |= {f"model.{name}": tensor for name, tensor in persistent_buffers(self._decoder)}
        for name, tensor in everywhere.items():
            shards[name] = Shard(tensor, 0, tuple(tensor.shape), self._world.rank, self._world.size)
        return shards

    def _steps(self) -> Iterator[tuple[str, int]]:
        """(name in the checkpoint, flat tensor) of each trained parameter's step, on every rank."""
        for index, group in enumerate(self._groups):
            yield from ((f"optimizer.{self._name[parameter]}.step", index) for parameter, _ in group)

    def _scaler(self) -> dict[str, torch.dtype]:
        return _LOSS_SCALER if self._fp16 and self._optimizer.loss_scaler.dynamic else {}

    @torch.no_grad()
    def loaded(self) -> None:
        """Takes over what was written into `shards()`, and makes the weights that compute from those that train."""
        for index, flat in enumerate(self.flats):
            with self._in_memory(index, write=True):
                for fragment in self._of_flat(index) if self._on_disk(index) else ():
                    for name, run in self._runs(fragment):
                        run.copy_(self._copies[name])
                steps = {float(self._copies[name]) for name, of_flat in self._steps() if of_flat == index}
                if len(steps) > 1:
                    raise TrainingError(
                        f"ZeRO counts AdamW's steps once for many parameters, and the checkpoint has {sorted(steps)}"
                    )
                self._adamw.state[flat]["step"].fill_(steps.pop())
        for attribute in self._scaler():
            setattr(self._optimizer.loss_scaler, attribute, self._copies[f"loss_scale.{attribute}"].item())
        if self._stage == 3:
            self._refresh_stage_3()
        else:
            self._optimizer.update_lp_params()  # this rank's part, then all ranks' parts

    def _refresh_stage_3(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()  # frees the small parameters that are kept whole
        for index, flat in enumerate(self.flats):
            partitions = optimizer.fp16_partitioned_groups_flat[index]
            with self._in_memory(index, write=False):
                if partitions is None:
                    optimizer._partitioned_params_swap_out(index)
                else:
                    partitions.data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()  # and gathers them again

    # ------------------------------------------------------------------------------------------- whole tensors

    @torch.no_grad()
    def whole(self, parameter: Any, device: torch.device) -> Tensor:
        """A trained parameter's float32 weight, put together from all ranks; all ranks call."""
        name = self._name[parameter]
        shape = parameter.ds_shape if self._stage == 3 else parameter.shape
        whole = torch.zeros(shape, dtype=torch.float32, device=device)
        for fragment in self._fragments:
            if fragment.name == name:
                with self._in_memory(fragment.flat, write=False):
                    run = self.flats[fragment.flat].detach()[fragment.place]
                    whole.view(-1)[fragment.start : fragment.start + run.numel()] = run.to(device)
        dist.all_reduce(whole)  # each element is zero but on one rank
        return whole

    def runs_of_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, slice]]:
        """Each parameter with its flat tensor, in whose `grad` its gradient lies at the step, and where."""
        parameter_of = {name: parameter for parameter, name in self._name.items()}
        for fragment in self._fragments:
            yield parameter_of[fragment.name], self.flats[fragment.flat], fragment.place
