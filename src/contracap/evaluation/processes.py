"""Processes that evaluate one model together, each a share of the samples."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from contracap.data.workers import prepared

Value = TypeVar("Value")
Item = TypeVar("Item")
SIGN_OF_LIFE = 60.0  # seconds from one to the next while the first process works for all


@runtime_checkable
class Processes(Protocol):
    """Those that evaluate together; every one makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def collect(self, value: Value) -> list[Value]:
        """The values of all, in their order; anything that can be pickled."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process, which has everything to itself."""

    rank: int = 0
    count: int = 1

    def collect(self, value: Value) -> list[Value]:
        """Its own value."""
        return [value]


ALONE = Alone()


def together(processes: Processes, work: Callable[[], Value]) -> Value:
    """What `work` gives here, once it has succeeded in every process: none goes on to wait for one that has failed.

    Raises:
        Exception: what `work` raised here.
        ValueError: if it failed in another process; says in which, and why.
    """
    problem, done = None, []
    try:
        done.append(work())
    except Exception as error:
        problem = error
    reasons = processes.collect("" if problem is None else str(problem) or type(problem).__name__)
    if problem is not None:
        raise problem
    for rank, reason in enumerate(reasons):
        if reason:
            raise ValueError(f"rank {rank}: {reason}")
    return done[0]


def by_the_first(processes: Processes, work: Callable[[], Value]) -> Value:
    """What `work` gives in the first process, for all. It may take hours: meanwhile the first says again and again that
    it is at work, for processes take one that says nothing for lost.

    Raises: Exception: what `work` raised; in the other processes a ValueError that says the same.
    """
    if processes.count == 1:
        return work()
    with ThreadPoolExecutor(1) as aside:
        later = aside.submit(work) if processes.rank == 0 else None

        def look() -> list[Value]:
            if later is None or later not in wait([later], SIGN_OF_LIFE).done:
                return []
            return [later.result()]

        found = list[Value]()
        while not found:
            found = processes.collect(together(processes, look))[0]
    return found[0]


def in_shares(
    processes: Processes,
    batches: Iterable[Item],
    prepare: Callable[[Item], Tensor],
    encode: Callable[[Tensor], Float[Tensor, "batch embed"]],
) -> Float32[Tensor, "row embed"]:
    """The encoded rows of all batches in their order, on the CPU, of which each process encodes every n-th batch.

    All make the same number of passes, which a model that is shared out needs: where the batches run out, a process
    encodes one of another's once more.

    Args:
        batches: the same in every process.
        prepare, encode: may fail; then this ends in every process. (Of a model that is shared out, one that fails
            while it encodes leaves the others waiting for its share.) Threads prepare, ahead of what is encoded.

    Raises:
        Exception: of `batches`, `prepare` or `encode`; in the other processes a ValueError that says the same.
    """
    rows = list[Tensor]()

    def own_batches() -> Generator[tuple[Item, bool], None, None]:  # of those of the others nothing is kept
        stream = iter(batches)
        while group := list(islice(stream, processes.count)):
            yield group[min(processes.rank, len(group) - 1)], processes.rank < len(group)

    with prepared(lambda item: prepare(item[0]), own_batches()) as own:
        while (found := together(processes, lambda: next(own, None))) is not None:
            (_, counts), inputs = found
            encoded = together(processes, partial(_encoded, encode, inputs))
            if counts:
                rows.append(encoded)
    shares = processes.collect(rows)
    return torch.cat([rows for group in zip_longest(*shares) for rows in group if rows is not None])


def _encoded(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return encode(inputs).float().cpu()
