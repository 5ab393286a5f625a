"""Worker processes that make endless items in turn: torch's loader, where workers may die and programs may end."""

import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from contracap.data.workers import WorkerError

LOOK = 1.0  # seconds of waiting for an item before one looks whether the workers are alive, again and again
GRACE = 0.1  # seconds that a process may still count as alive after its pipes have closed, and a thread has to end in

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
    processes = list[BaseProcess]()
    # At the latest before `multiprocessing` waits for them, which it would do forever: they do not heed its SIGTERM.
    end = Finalize(None, _kill, args=[processes], exitpriority=0)
    with _starting(processes):
        loader = iter(
            DataLoader(
                _Dataset(endless),
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # its own, or the loader would draw from the model's random numbers
                worker_init_fn=_stay,
            )
        )
    if not workers:
        while True:
            yield [next(loader)]

    # A worker that dies while it writes leaves half a message, whose reader waits forever: only another thread can see
    # that the worker is dead.
    asked, read = SimpleQueue[bool](), SimpleQueue[list[Item] | Exception]()

    def answer() -> None:
        while asked.get():
            try:
                read.put([next(loader) for _ in processes])
            except Exception as error:
                read.put(error)

    reader = threading.Thread(target=answer, daemon=True)
    reader.start()
    try:
        while True:
            asked.put(True)
            yield _awaited(read, processes)
    finally:
        asked.put(False)
        end()  # torch would wait for those that are slow to make an item; a forked copy of this process ends nothing
        reader.join(GRACE)  # it never ends if a worker died in the midst of an item


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


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _as_it_is(item: Item) -> Item:
    return item


def _stay(worker: int) -> None:
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
