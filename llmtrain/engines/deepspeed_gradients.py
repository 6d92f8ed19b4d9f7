"""Gradients that DeepSpeed keeps in its buffers from one step to the next."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class OldGradients:
    """Zeroes what is left of the last step for parameters that this step uses late or not at all.

    DeepSpeed overwrites its buffers in the first micro-batch of a step and adds in the others. A
    parameter without a gradient in the first one (an expert without tokens) would add to the gradient
    of the step before, and one without any would be stepped by it once more. What was swapped out to
    NVMe is not reached.

    Args:
        optimizer: DeepSpeed's, of stage 1, 2 or 3.
        accelerator: DeepSpeed's.
        stage: of ZeRO.
        offloaded: whether the optimizer is on the CPU or on NVMe.
        runs: each trained parameter that this rank steps some of, its flat tensor and its place in there.
    """

    def __init__(
        self,
        optimizer: Any,
        accelerator: Any,
        stage: int,
        offloaded: bool,
        runs: Iterable[tuple[nn.Parameter, Tensor, slice]],
    ):
        self._optimizer, self._accelerator = optimizer, accelerator
        self._copied = offloaded and stage < 3  # whole gradients wait in host memory
        self._used: set[nn.Parameter] = set()
        self._accumulated: dict[nn.Parameter, Tensor] = {}  # in stage 3, this rank's part
        filled: set[nn.Parameter] = set()
        if stage == 3:
            # Leaf modules are reduced as one, and DeepSpeed itself fills in zeros.
            filled = {parameter for leaf in optimizer.leaf_parameters.values() for parameter in leaf}
            begin = 0
            for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
                end = begin + parameter.partition_numel()
                self._accumulated[parameter] = optimizer.grad_partitions_flat_buffer[begin:end]
                begin = end
        self._runs = [run for run in runs if run[0] not in filled]
        for parameter, _, _ in self._runs:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: nn.Parameter) -> None:
        """Called when a parameter has got its gradient of a micro-batch, which DeepSpeed has not yet added."""
        if parameter in self._used:
            return
        self._used.add(parameter)
        optimizer = self._optimizer
        if parameter in self._accumulated and optimizer.micro_step_id > 0:
            with self._accelerator.stream(optimizer.reduce_and_partition_stream):
                self._accumulated[parameter].zero_()
        elif self._copied and optimizer.micro_step_id > 0:
            left = optimizer.accumulated_grads_in_cpu.get(optimizer.get_param_id(parameter))
            if left is not None:
                left.zero_()

    def forget(self) -> None:
        """Called before a step."""
        for parameter, flat, place in self._runs:
            if parameter not in self._used:
                if flat.grad is not None:
                    flat.grad[place].zero_()
                if parameter in self._accumulated:
                    self._accumulated[parameter].zero_()
        self._used.clear()
