"""Worker processes that make endless items in turn.

Torch's loader is not used: its handler of SIGCHLD raises an error wherever the main thread is when a worker dies,
perhaps with a lock in its hands; and its workers share a pipe and locks, which one that dies takes with it. Here each
has a pipe of its own, which ends when it dies.
"""

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

import torch
from torch import multiprocessing  # pickles tensors as shared memory

from contracap.data.workers import WorkerError

AHEAD = 2  # items that a worker makes before they are taken
GRACE = 0.1  # seconds that a process gets to end in when its pipe has

Item = TypeVar("Item")


def rounds(make: Callable[[int, int], Iterator[Item]], workers: int) -> Generator[list[Item], None, None]:
    """An item of each worker, in their order, again and again; with 0 workers, those of this process, one by one.

    The workers leave it to this process when they end: a scheduler asks all processes at once, and a run has a step to
    finish. They end when this is closed and, at the latest, when the program ends; nobody waits for an item then.

    Args:
        make: from the number of a worker and the count of all, its items, without end. With workers they are pickled.

    Raises:
        WorkerError: if a worker is dead when its item is waited for.
        Exception: of `make`; a note holds the traceback, if it is a worker's.
    """
    if not workers:
        yield from ([item] for item in make(0, 1))
        return
    started, here = list[_Worker[Item]](), os.getpid()
    try:
        for number in range(workers):
            started.append(_Worker(make, number, workers, [worker.pipe for worker in started]))
        while True:
            yield [worker.take() for worker in started]
    finally:
        if os.getpid() == here:  # not in a forked copy, for whom they do not work
            for worker in started:
                worker.dismiss()
            for worker in started:
                worker.end()


class _Worker(Generic[Item]):
    """A process that makes items, and this process's end of the pipe between."""

    def __init__(
        self, make: Callable[[int, int], Iterator[Item]], number: int, workers: int, others: Sequence[Connection]
    ) -> None:
        self.pipe, its_own = multiprocessing.Pipe()
        with its_own:  # which no other process may have, or it would not end with the worker
            self._process = multiprocessing.Process(
                target=_work, args=(its_own, [*others, self.pipe], make, number, workers), daemon=True
            )
            self._process.start()
        # At its end `multiprocessing` waits for workers, which do not heed its SIGTERM.
        self._at_exit = Finalize(None, self._process.kill, exitpriority=0)
        for _ in range(AHEAD):
            self._ask(True)

    def take(self) -> Item:
        """Its next item."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(GRACE)
            if (status := self._process.exitcode) is None:
                raise
            ended = f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
            raise WorkerError(f"process {self._process.pid}: {ended}") from None
        if isinstance(found, _Failure):
            raise found.error
        self._ask(True)
        return found

    def dismiss(self) -> None:
        """Let it end when it has made the item that it is at."""
        self._ask(False)
        self.pipe.close()

    def end(self) -> None:
        """Wait no longer for that."""
        self._process.join(GRACE)
        self._process.kill()
        self._process.join(GRACE)
        self._at_exit.cancel()

    def _ask(self, more: bool) -> None:
        with suppress(OSError):  # it is dead, and its pipe says so when it is read
            self.pipe.send(more)


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _work(
    pipe: Connection, others: Sequence[Connection], make: Callable[[int, int], Iterator[Any]], number: int, workers: int
) -> None:
    """What a worker does: an item for each time it is asked."""
    for other in others:
        other.close()
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    items = make(number, workers)
    with suppress(EOFError, ConnectionError):  # the process that asks is dead
        while pipe.recv():
            pipe.send_bytes(_next(items))


def _next(items: Iterator[Any]) -> bytes | memoryview:
    """The next item, or why there is none, pickled."""
    try:
        return ForkingPickler.dumps(next(items))
    except Exception as error:
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            message = ForkingPickler.dumps(_Failure(error))
            pickle.loads(message)
        except Exception:  # of an exception whose class takes other arguments
            return ForkingPickler.dumps(_Failure(RuntimeError("".join(traceback.format_exception(error)))))
        return message
