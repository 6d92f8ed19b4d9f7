"""The copy that an asynchronous save makes before training goes on."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager


class HostCopies(AsyncStager):
    """Copies tensors into host memory that is kept for the next save.

    Kept, because fresh memory costs a page fault every 4 kB, and pinning it on a GPU machine costs
    more than the copy. DCP's own stager copies the whole storage behind a view, which for a
    replica's share of a tensor would be all of it.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {key: self._copied(tensors) for key, tensors in state_dict.items()}

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    def synchronize_staging(self) -> None:
        """Staging is over when `stage` returns."""

    def close(self) -> None:
        self._copies.clear()
