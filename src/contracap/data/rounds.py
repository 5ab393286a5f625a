"""Worker processes that make endless items in turn: torch's loader, where workers may die and programs may end."""

import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from contracap.data.workers import WorkerError

LOOK = 1.0  # seconds of waiting for an item before one looks whether the workers are alive, again and again
GRACE = 0.1  # seconds that a process may still count as alive when its pipes have closed, and a thread gets to end in

Item = TypeVar("Item")


def rounds(endless: Iterable[Item], workers: int) -> Generator[list[Item], None, None]:
    """An item of each worker, in their order, again and again; with 0 workers, those of this process, one by one.

    The workers leave it to this process when they end: a scheduler asks all processes at once, and a run has a step to
    finish. When the program ends, so do they, even if it still refers to this.

    Args:
        endless: iterated in each worker; `torch.utils.data.get_worker_info` tells in which.

    Raises:
        WorkerError: if a worker is dead when its item is waited for.
        Exception: of `endless`; from a worker, with its traceback as text.
    """
    processes, ending = list[BaseProcess](), RawValue("b")
    end = Finalize(None, _end, args=[processes, ending], exitpriority=0)  # the latest: multiprocessing would wait
    with _starting(processes):
        loader = iter(
            DataLoader(
                _Dataset(endless),
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # its own, or the loader would draw from the model's random numbers
                worker_init_fn=partial(_stay, ending),
            )
        )
    if not workers:
        while True:
            yield [next(loader)]

    asked, read = SimpleQueue[bool](), SimpleQueue[list[Item] | Exception]()
    reader = threading.Thread(target=_answer, args=[loader, len(processes), asked, read], daemon=True)
    reader.start()
    del loader
    try:
        while True:
            asked.put(True)
            yield _awaited(read, processes)
    finally:
        asked.put(False)
        end()  # in this process: a forked copy of it ends nothing
        reader.join(GRACE)


def _answer(
    loader: Iterator[Item], workers: int, asked: "SimpleQueue[bool]", read: "SimpleQueue[list[Item] | Exception]"
) -> None:
    """What is done in a thread, to which the loader is left altogether. A worker that ends in the midst of an item
    leaves half a message, and one that ends while it has a lock never gives it back: who waits for either, waits
    forever, and only another thread can see that the worker is dead.
    """
    while asked.get():
        try:
            read.put([next(loader) for _ in range(workers)])
        except Exception as error:
            read.put(error.with_traceback(None))  # which refers to the loader


def _awaited(read: "SimpleQueue[list[Item] | Exception]", processes: Sequence[BaseProcess]) -> list[Item]:
    while True:
        try:
            found = read.get(timeout=LOOK)
        except Empty:
            for process in processes:
                if process.exitcode:  # one that raised an error ends with 0, and what it said comes in its turn
                    raise _death(process) from None
            continue
        if not isinstance(found, Exception):
            return found
        if not str(found).startswith("Caught "):  # as torch says of what was raised by a worker
            for process in processes:
                process.join(GRACE)
                if process.exitcode is not None:
                    raise _death(process)
        raise found


def _death(process: BaseProcess) -> WorkerError:
    status = process.exitcode or 0
    ended = f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    return WorkerError(f"process {process.pid}: {ended}")


class _Dataset(IterableDataset):
    def __init__(self, items: Iterable[object]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[object]:
        return iter(self._items)


@contextmanager
def _starting(processes: list[BaseProcess]) -> Iterator[None]:
    """Notes the workers that torch's loader starts within it, and keeps the handler of SIGCHLD.

    Torch's raises an error wherever the main thread is when a worker dies: a lock that is just taken there is never
    given back, and other threads wait for it forever.
    """
    others = set(active_children())
    # Where there is no such signal, and in other threads, torch sets no handler.
    settable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if settable else None
    try:
        yield
    finally:
        processes += [child for child in active_children() if child not in others]
        if handler is not None:  # None: also one that is not of Python
            signal.signal(signal.SIGCHLD, handler)


def _end(processes: Iterable[BaseProcess], ending: Any) -> None:
    ending.value = True
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(LOOK)
        process.kill()


def _as_it_is(item: Item) -> Item:
    return item


def _stay(ending: Any, worker: int) -> None:
    """Heed SIGTERM once the process that started this one has said so, then with status 0: torch's handler of SIGCHLD,
    where a program has it from another loader, raises errors at others."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: os._exit(0) if ending.value else None)
