"""The processes that train or evaluate one model together, and the messages between them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=10)  # then a rank that waits for others considers them lost


class ParallelError(ValueError):
    """The ranks cannot be started, or cannot share the model or the batch, as asked."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes that work on one model, as seen by one of them. By default there is only one.

    With more than one, every rank must make the same calls in the same order.

    Attributes:
        rank: this process, from 0; rank 0 writes the files.
        world_size: ranks on all machines.
        local_world_size: ranks on this machine.
        device: where this rank computes.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")

    def broadcast(self, value: Value) -> Value:
        """Return the value of rank 0; anything that can be pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks in order of rank; anything small that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over the ranks, element by element."""
        if self.world_size == 1:
            return numbers
        total = numbers.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, *claims: bool) -> list[bool]:
        """Return for each claim whether it is true on any rank."""
        if self.world_size == 1:
            return list(claims)
        return [number > 0 for number in self.sum(torch.tensor(claims, dtype=torch.int32, device=self.device)).tolist()]

    def mean(self, numbers: Tensor) -> Tensor:
        """Return the mean over the ranks, element by element.

        A loss that each rank divides by this mean of its token counts is, averaged over the ranks, the sum over all
        tokens divided by their number.
        """
        return numbers if self.world_size == 1 else self.sum(numbers) / self.world_size

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        if self.world_size > 1:
            dist.barrier()


class Agreement:
    """A question to all ranks at every step, which waits for no other rank's work: the answer is that to the previous
    question."""

    def __init__(self, process_group: ProcessGroup):
        self._process_group = process_group
        self._asked: tuple[dist.Work, Tensor] | None = None

    def ask(self, *claims: bool) -> list[bool]:
        """Return, for each claim of the previous call, whether any rank made it. One process alone gets its own claims.

        Every rank must call it at the same steps.
        """
        if self._process_group.world_size == 1:
            return list(claims)
        earlier, counts = self._asked, torch.tensor(claims, dtype=torch.int32)
        self._asked = dist.all_reduce(counts, async_op=True), counts
        if earlier is None:
            return [False] * len(claims)
        work, counts = earlier
        work.wait()
        return [count > 0 for count in counts.tolist()]


@contextmanager
def start_process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the ranks that `torchrun` started, for the duration of the block; without `torchrun`, be the only one.

    Messages between CUDA devices use nccl, others gloo. After an error on CUDA the group ends with the process.

    Args:
        device: only its type counts; with several CUDA devices each rank takes its own.

    Raises: ParallelError: if torchrun's environment variables are incomplete, or a rank finds no device of its own.
    """
    world_size = _variable("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if world_size == 1:
        yield ProcessGroup(device=device)
        return
    rank, local_rank, local_world_size = (_variable(name) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"rank {rank} is number {local_rank} on its machine, which has {torch.cuda.device_count()} CUDA "
                "devices: give torchrun --nproc-per-node that number, or less"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if world_size == local_world_size:
        # torchrun keeps its store when it restarts ranks, and gloo would connect to the addresses of dead ones. On
        # several machines the restart counts may differ, so there another restart may be needed.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # objects and checkpoints go through gloo
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield ProcessGroup(rank=rank, world_size=world_size, local_world_size=local_world_size, device=device)
    except BaseException:
        # nccl would wait for unfinished messages to ranks that may be lost; gloo does not, so the process can start
        # a group again.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _variable(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ParallelError(
            f"WORLD_SIZE is set, but {name} is {os.environ.get(name) or 'not set'}: start the ranks with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        ) from None
