"""Evaluation of one model by several ranks, each of which takes a share of the samples."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import islice, zip_longest
from typing import TypeVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from contracap.data.workers import prepare_ahead
from contracap.parallel.process_group import ProcessGroup

Value = TypeVar("Value")
BatchType = TypeVar("BatchType")
KEEPALIVE_SECONDS = 60.0  # between messages from rank 0 while the others wait for it


def run_on_every_rank(process_group: ProcessGroup, work: Callable[[], Value]) -> Value:
    """Return the result of `work` once it has succeeded on every rank, so that no rank waits for one that has failed.

    Raises: Exception: from `work` on this rank. ValueError: if it failed on another rank; says on which, and why.
    """
    problem, done = None, []
    try:
        done.append(work())
    except Exception as error:
        problem = error
    reasons = process_group.all_gather("" if problem is None else str(problem) or type(problem).__name__)
    if problem is not None:
        raise problem
    for rank, reason in enumerate(reasons):
        if reason:
            raise ValueError(f"rank {rank}: {reason}")
    return done[0]


def run_on_rank_0(process_group: ProcessGroup, work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0 and return its result on every rank.

    It may take hours: rank 0 sends keep-alive messages meanwhile, so that the other ranks do not give up.

    Raises: Exception: from `work`; on the other ranks a ValueError that says the same.
    """
    if process_group.world_size == 1:
        return work()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(work) if process_group.rank == 0 else None

        def look() -> list[Value]:
            if future is None or future not in wait([future], KEEPALIVE_SECONDS).done:
                return []
            return [future.result()]

        found = list[Value]()
        while not found:
            found = process_group.all_gather(run_on_every_rank(process_group, look))[0]
    return found[0]


def encode_in_shares(
    process_group: ProcessGroup,
    batches: Iterable[BatchType],
    prepare: Callable[[BatchType], Tensor],
    encode: Callable[[Tensor], Float[Tensor, "batch embed"]],
) -> Float32[Tensor, "row embed"]:
    """Return the encoded rows of all batches in order, on the CPU; each rank encodes every n-th batch.

    All ranks run the model equally often, which a sharded model needs: after its last batch, a rank encodes a batch of
    another rank again.

    Args:
        batches: the same on every rank.
        prepare: run in threads, ahead of `encode`.
        encode: an error in it ends this on every rank, except that a sharded model leaves the other ranks waiting.

    Raises: Exception: from `batches`, `prepare` or `encode`; on the other ranks a ValueError that says the same.
    """
    rows = list[Tensor]()

    def own_batches() -> Generator[tuple[BatchType, bool], None, None]:  # rows of another rank's batch are dropped
        stream = iter(batches)
        while group := list(islice(stream, process_group.world_size)):
            yield group[min(process_group.rank, len(group) - 1)], process_group.rank < len(group)

    with prepare_ahead(lambda item: prepare(item[0]), own_batches()) as own:
        while (found := run_on_every_rank(process_group, lambda: next(own, None))) is not None:
            (_, is_own), inputs = found
            encoded = run_on_every_rank(process_group, partial(_encode, encode, inputs))
            if is_own:
                rows.append(encoded)
    shares = process_group.all_gather(rows)
    return torch.cat([rows for group in zip_longest(*shares) for rows in group if rows is not None])


def _encode(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return encode(inputs).float().cpu()
