"""Several processes that train one GHN: each runs its share of the networks, gradients are averaged."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

import torch
import torch.distributed as dist

from ghn_init._errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

T = TypeVar("T")

_CPU = torch.device("cpu")

PATIENCE: Final = timedelta(days=1)
"""How long a process waits for another one that is there: through its validation, or while it is held
(SIGSTOP). One that is gone is noticed at once, by its connection."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those of a run; `Ranks()` is a run in one process on the CPU.

    Methods that exchange something raise TrainingError where another process is lost.

    Attributes:
        rank: Its number.
        world: Number of processes.
        device: Where it computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @classmethod
    def current(cls) -> Ranks:
        """The place in torch.distributed's default group, if there is one, and the device to use."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local_device())
        return cls(device=local_device())

    @classmethod
    def join(cls) -> Ranks:
        """Meet the other processes that torchrun or `accelerate launch` started, if one of them did.

        There are WORLD_SIZE of them, this one is the one of number RANK, and the first one's address is in
        MASTER_ADDR and MASTER_PORT. Gradients are exchanged through
        gloo, by way of the CPU: they are few megabytes, and several processes may share a GPU, which NCCL
        refuses.

        Raises:
            TrainingError: The processes did not find each other, or `accelerate launch` would start them
                through mpirun.
        """
        if "WORLD_SIZE" in os.environ:
            _meet(*_place())
        else:
            _check_launcher()
        return cls.current()

    @staticmethod
    def leave() -> None:
        """End what `join` began, once nothing is exchanged any more; in a run of one process do nothing.

        A process that ends without this is sometimes aborted ("terminate called without an active
        exception"): gloo's threads let go of the last tensors while Python is shutting down.
        """
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, validates and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a meta-batch."""
        return list(items[self.rank :: self.world])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over all processes, in place, in one exchange."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten().to(self.device) for tensor in tensors]).cpu()
        with self._exchange():
            dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def exchange(self, tensors: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The tensors, of which every process has computed a part, as they are after that.

        Args:
            tensors: On the CPU, of one dtype; those of this process's part have their values.
            parts: For every process the indices of what it has computed.
        """
        found = list(tensors)
        for rank, part in enumerate(parts):
            sizes = [tensors[index].numel() for index in part]
            if self.world == 1 or not part:
                continue
            if rank == self.rank:
                flat = torch.cat([tensors[index].flatten() for index in part])
            else:
                flat = tensors[part[0]].new_empty(sum(sizes))
            with self._exchange():  # gloo gathers only half as fast as it broadcasts
                dist.broadcast(flat, rank)
            if rank != self.rank:
                for index, values in zip(part, flat.split(sizes), strict=True):
                    found[index] = values.view_as(tensors[index])
        return found

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every process's values, equally many; the first one's (its clock, say) decide for all."""
        if self.world == 1:
            return [list(values)]
        tensor = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        with self._exchange():
            dist.all_gather(gathered, tensor)
        return [part.tolist() for part in gathered]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises where a connection breaks
            raise TrainingError(
                f"process {self.rank} of {self.world} lost another one ({error}); "
                "start the same command again to go on from the checkpoint"
            ) from error


def _place() -> tuple[int, int]:
    """The number of this process and how many there are, as a launcher says."""
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    rank, world = (int(value) if value.isdecimal() else -1 for value in said.values())
    if not 0 <= rank < world:
        raise TrainingError(
            f"RANK={said['RANK']!r} and WORLD_SIZE={said['WORLD_SIZE']!r} in the environment; expected a "
            "process's number, from 0, and how many there are"
        )
    return rank, world


def _meet(rank: int, world: int) -> None:
    try:
        from torch.distributed.rendezvous import rendezvous  # not there where torch has no torch.distributed

        with _interruptible():
            # On its own it would have one time limit for meeting and for all that comes after.
            store, _, _ = next(rendezvous("env://", rank, world))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # a connection; a variable that is missing
        raise TrainingError(
            f"process {rank} of {world} did not find the others: {error}; expected the first one's address "
            "in MASTER_ADDR and MASTER_PORT. On several machines whose own names stand for 127.0.0.1 or "
            "127.0.1.1 in /etc/hosts, name the network interface between them as well: "
            "GLOO_SOCKET_IFNAME=eth0, say"
        ) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once: torch waits where Python's handlers do not run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # it was not set from Python
                signal.signal(number, handler)


def local_device() -> torch.device:
    """The GPU of this process, by turns where processes share them, or the CPU where there is none.

    CUDA_VISIBLE_DEVICES and `accelerate launch --cpu` are obeyed.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available():
        return _CPU
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def _check_launcher() -> None:
    """Refuse `accelerate launch --cpu --num_processes 2`: it starts one process, or several through mpirun.

    It gives the address of the first process either way, which it does not for a single one.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise TrainingError(
            "`accelerate launch --cpu` starts several processes through mpirun at best, or this one alone; "
            "use `torchrun --nproc-per-node N`, or `accelerate launch --multi_gpu`, which needs no GPU"
        )
