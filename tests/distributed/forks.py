"""Ranks without torchrun: forks of one process, which find everything imported."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable


def free_port() -> int:
    """A port at which rank 0 can be met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(count: int, work: Callable[[int], None]) -> None:
    """Let so many ranks work, each told its number, and exit as they did; under hsdp half of them share."""
    import torch
    import torch._dynamo  # DDP and FSDP need these
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    forking = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [forking.Process(target=_start, args=(rank, count, port, work)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


def _start(rank: int, count: int, port: int, work: Callable[[int], None]) -> None:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count // 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    work(rank)
