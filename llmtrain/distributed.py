"""Ranks, their process group, and the few collectives that are not an engine's business.

Ranks come from the environment that torchrun sets. In one process there is no process group, and
every function here is the identity.
"""

import logging
import os
import re
import resource
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not re-exported as types go

from llmtrain.contracts import Sum
from llmtrain.errors import InputError, RankLost, TrainingError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: 0 to size - 1, over all nodes.
        size: number of processes.
        local_rank: 0 to local_size - 1, on this node; the index of this process's GPU.
        local_size: processes on this node.
        device: what this rank computes on.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int, int]:
    """(rank, size, local_rank, local_size) as torchrun announces them; (0, 1, 0, 1) without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in environment]
    if not given:
        return 0, 1, 0, 1
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in environment)
        raise InputError(
            f"{', '.join(given)} set but not {missing}",
            where="environment",
            remedy="start with torchrun, or unset them to train in one process",
        )
    try:
        rank, size, local_rank, local_size = (int(environment[name]) for name in names)
    except ValueError as error:
        raise InputError(
            f"ranks must be integers: {error}", where="environment", remedy="start with torchrun"
        ) from None
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        given_ranks = ", ".join(f"{name}={environment[name]}" for name in names)
        raise InputError(
            f"these ranks do not fit each other: {given_ranks}", where="environment", remedy="start with torchrun"
        )
    return rank, size, local_rank, local_size


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank; `wanted` is auto, cpu or cuda."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("device cuda is asked for and there is none", where="device", remedy="use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}",
            where="device",
            remedy="start at most one process a GPU (torchrun --nproc-per-node)",
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined(wanted_device: str, timeout_seconds: int | None) -> Iterator[World]:
    """Joins the process group that the launcher announced, and leaves it at the end.

    `timeout_seconds` is the deadline of each of its collectives; None is torch's own.
    """
    rank, size, local_rank, local_size = ranks_from_environment()
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Where DeepSpeed is installed transformers imports it, and it would look for GPUs and warn of none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if size > 1:
        _join(device, timeout_seconds)
    try:
        yield World(rank, size, local_rank, local_size, device)
    finally:
        if dist.is_initialized():  # DeepSpeed makes a group for one process too
            dist.destroy_process_group()


def _join(device: torch.device, timeout_seconds: int | None) -> None:
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=None if timeout_seconds is None else timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except ValueError as error:  # of the variables that say where
        raise InputError(
            f"the ranks cannot meet at {_meeting_place()}: {str(error).splitlines()[0]}",
            where="environment",
            remedy="start with torchrun; on several nodes give all of them the same --rdzv-endpoint",
        ) from error
    except dist.DistError as error:
        raise TrainingError(
            f"the ranks did not meet at {_meeting_place()}: {str(error).splitlines()[0]}\n  remedy: see why a rank did "
            "not come (its own output); check that all nodes reach this address, and that no firewall is between them"
        ) from error


def _meeting_place() -> str:
    return ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _collective_device() -> torch.device:
    backend = dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def sum_scalars(values: Sequence[float]) -> list[float]:
    """Sums of each value over the ranks, in float64, by one collective."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    return total.tolist()


def sum_array(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums over the ranks of an array of the same shape on each; on every rank."""
    if not dist.is_initialized():
        return values
    total = torch.from_numpy(values).to(_collective_device())
    dist.all_reduce(total)
    summed: npt.NDArray[np.float64] = total.cpu().numpy()
    return summed


def of_main(action: Callable[[], T], world: World) -> T:
    """What `action` gives on rank 0, on every rank; an InputError in it is raised on all of them."""
    made, failure = None, None
    if world.is_main:
        try:
            made = action()
        except InputError as error:
            failure = (error.message, error.where, error.remedy)
    made, failure = broadcast_object((made, failure))
    if failure is not None:
        message, where, remedy = failure
        raise InputError(message, where=where, remedy=remedy)
    return cast(T, made)


def on_any_rank(flag: bool) -> bool:
    return sum_scalars([float(flag)])[0] > 0


def average(sums: Mapping[str, Sum]) -> dict[str, float]:
    """value / weight of each metric after one reduction over the ranks; NaN where nothing counted.

    All ranks give the same names in the same order.
    """
    # Stacked where they are: one wait for the device, however many metrics there are.
    on_device = [s.value.detach().double() for s in sums.values() if isinstance(s.value, torch.Tensor)]
    from_device = iter(torch.stack(on_device).tolist() if on_device else [])
    values = [next(from_device) if isinstance(s.value, torch.Tensor) else s.value for s in sums.values()]
    totals = sum_scalars([*values, *(s.weight for s in sums.values())])
    num = len(sums)
    return {name: totals[i] / totals[num + i] if totals[num + i] else float("nan") for i, name in enumerate(sums)}


def cpu_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """A group of all ranks for CPU tensors and objects, apart from the one that trains; None in one process."""
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; for small control data only."""
    if not dist.is_initialized():
        return [value]
    holder: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(holder, value)
    return holder  # type: ignore[return-value]


class SideStore:
    """One thread's connection to a key-value store that rank 0 hosts beside the process group.

    It serves while every main thread sits in a collective. A call may block for ever while rank 0 is
    stopped, whatever timeout the store is given: so it belongs into a thread of its own.

    Raises:
        ConnectionError: from every method, when rank 0 is gone (and from `seek` also OSError).
    """

    def __init__(self, client: TCPStore, server: TCPStore | None):
        self._client, self._server = client, server

    def seek(self) -> None:
        """Finds out in silence whether rank 0 is there: the other methods print a C++ stack when it is not."""
        socket.create_connection((self._client.host, self._client.port), timeout=5).close()

    def set(self, key: str, value: str) -> None:
        with _as_connection_error():
            self._client.set(key, value)

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values, in one round trip; waits for those that were never set."""
        with _as_connection_error():
            values: list[bytes] = self._client.multi_get(list(keys))
        return values


@contextmanager
def _as_connection_error() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise ConnectionError(str(error).partition("\n")[0]) from error


def side_store(world: World) -> SideStore:
    """Connects to a new store that rank 0 opens; all ranks of a world of several call it.

    Where all ranks are on one node it listens on the loopback only; else on every interface, under
    the address at which the ranks found rank 0 (MASTER_ADDR).
    """
    alone = world.local_size == world.size
    server, address = None, None
    if world.is_main:
        _allow_open_files(2 * world.size)
        dual = not alone and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            ("127.0.0.1" if alone else "", 0),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=world.size,
        )
        host = "127.0.0.1" if alone else os.environ["MASTER_ADDR"]
        address = host, listener.getsockname()[1]
        server = TCPStore(
            *address, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
    host, port = broadcast_object(address) or ("", 0)
    client = TCPStore(host, port, is_master=False, wait_for_workers=False, use_libuv=True)
    return SideStore(client, server)


def _allow_open_files(more: int) -> None:
    """Raises this process's soft limit, which is often 1,024: each rank is a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + more if hard == resource.RLIM_INFINITY else min(1024 + more, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """A collective in here that fails because another rank is gone, or does not come, raises RankLost."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which only the source file in their text tells from others.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        text = str(error).partition("\n")[0]
        reason = re.sub(r"^\[[^]]*] ", "", text)
        raise RankLost(f"a collective failed: {reason}") from error
