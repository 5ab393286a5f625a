"""Ranks without torchrun: forks of one process, which find everything imported."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection


def run_ranks(count: int, work: Callable[[int, list[int]], None], *, groups: int = 1) -> None:
    """Let so many ranks work, and exit as they did; under hsdp half of them share.

    Args:
        work: told the rank's number, and a port for each process group that the ranks will make, one after the other;
            MASTER_PORT is the first of them.
        groups: how many those are.
    """
    import torch
    import torch._dynamo  # DDP and FSDP need these
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    forking = multiprocessing.get_context("fork")
    told, tell = forking.Pipe(duplex=False)
    host = forking.Process(target=_host, args=(groups, tell), daemon=True)
    host.start()
    ports = told.recv()
    ranks = [forking.Process(target=_start, args=(rank, count, ports, work)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    host.terminate()
    sys.exit(any(rank.exitcode for rank in ranks))


def _host(groups: int, tell: Connection) -> None:
    """Keep the stores at which ranks meet, as torchrun does. A port that is only chosen here and bound by rank 0 later
    may be another process's by then, and the other ranks would wait for rank 0 in vain."""
    import torch.distributed as dist

    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(groups)]
    tell.send([store.port for store in stores])
    multiprocessing.parent_process().join()


def _start(rank: int, count: int, ports: list[int], work: Callable[[int, list[int]], None]) -> None:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count // 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": ports[0],
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    work(rank, ports)
