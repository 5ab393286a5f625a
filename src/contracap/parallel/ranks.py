"""The processes that train together, and what they say to each other."""

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
TIMEOUT = timedelta(minutes=10)  # what a rank waits for the others, before it takes them for lost


class ParallelError(ValueError):
    """Ranks that cannot be started, or a model that cannot be spread over them, as asked."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together; by default it is alone, and each method gives back what it got.

    With more than one, every rank must make the same calls in the same order.

    Attributes:
        rank: from 0; rank 0 writes the files.
        count: ranks on all machines.
        local_count: ranks on this machine.
        device: where this rank computes.
    """

    rank: int = 0
    count: int = 1
    local_count: int = 1
    device: torch.device = torch.device("cpu")

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value; anything that can be pickled."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; anything small that can be pickled."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks, element by element."""
        if self.count == 1:
            return numbers
        total = numbers.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, *claims: bool) -> list[bool]:
        """Of each claim, whether it is true on any rank."""
        if self.count == 1:
            return list(claims)
        return [number > 0 for number in self.sum(torch.tensor(claims, dtype=torch.int32, device=self.device)).tolist()]

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean over the ranks, element by element.

        What is averaged later must be divided by this: a captioning loss whose `tokens` are the mean over the ranks of
        the labels they hold is, averaged over the ranks, the sum over all labels divided by their number.
        """
        return numbers if self.count == 1 else self.sum(numbers) / self.count

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.count > 1:
            dist.barrier()


class Agreement:
    """What any rank claims, asked at every step without making a rank wait for the others' work: the answer is that to
    the question before."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._asked: tuple[dist.Work, Tensor] | None = None

    def ask(self, *claims: bool) -> list[bool]:
        """Of each claim of the last call, whether any rank made it; of this call's, where one process is alone.

        Every rank must call it at the same steps.
        """
        if self._ranks.count == 1:
            return list(claims)
        earlier, counts = self._asked, torch.tensor(claims, dtype=torch.int32)
        self._asked = dist.all_reduce(counts, async_op=True), counts
        if earlier is None:
            return [False] * len(claims)
        work, counts = earlier
        work.wait()
        return [count > 0 for count in counts.tolist()]


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, in a process group (nccl between CUDA devices, gloo else) that ends with the
    context, or after an error on CUDA with the process; without `torchrun`, one process and no group.

    Args:
        device: its type counts; of several CUDA devices each rank takes its own.

    Raises: ParallelError: if torchrun's environment variables are incomplete, or a rank finds no device of its own.
    """
    count = _variable("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if count == 1:
        yield Ranks(device=device)
        return
    rank, local_rank, local_count = (_variable(name) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"rank {rank} is number {local_rank} on its machine, which has {torch.cuda.device_count()} CUDA "
                "devices: give torchrun --nproc-per-node that number, or less"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if count == local_count:
        # torchrun keeps its store when it starts ranks again, and gloo would connect to the addresses of dead ones.
        # On several machines the counts may differ, so there it is left to luck and another restart.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # objects and checkpoints go through gloo
        store=store,
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Ranks(rank=rank, count=count, local_count=local_count, device=device)
    except BaseException:
        # nccl would wait for what it has begun with ranks that may be lost; gloo does not, and the process can start
        # ranks again.
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
