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
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, IterableDataset

from contracap.data.workers import WorkerError

LOOK = 1.0  # seconds of waiting for an item before one looks whether the workers are alive, again and again
GRACE = 0.1  # seconds that a process may still count as alive after its pipes have closed

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
    with _starting_workers() as processes:
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
    except GeneratorExit:
        asked.put(False)
        reader.join()  # it refers to the loader, whose workers end when nobody does
    except BaseException:
        asked.put(False)
        _end(processes)  # torch would wait for each of them, as soon as nobody refers to the error any more
        raise


def _awaited(read: "SimpleQueue[list[Item] | Exception]", processes: Sequence[BaseProcess]) -> list[Item]:
    while True:
        try:
            found = read.get(timeout=LOOK)
        except Empty:
            _require_alive(processes)
            continue
        if not isinstance(found, Exception):
            return found
        if not str(found).startswith("Caught "):  # as torch says of what was raised by a worker, which lives
            _require_alive(processes, GRACE)
        raise found


def _require_alive(processes: Iterable[BaseProcess], grace: float = 0.0) -> None:
    for process in processes:
        process.join(grace)
        if (status := process.exitcode) is not None:
            ended = f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
            raise WorkerError(f"process {process.pid}: {ended}") from None


class _Dataset(IterableDataset):
    def __init__(self, items: Iterable[object]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[object]:
        return iter(self._items)


@contextmanager
def _starting_workers() -> Iterator[list[BaseProcess]]:
    """Those that torch's loader starts within it. Two habits of theirs are mended.

    They are ended before `multiprocessing` waits for them, which it would do forever: they do not heed its SIGTERM.

    And SIGCHLD keeps its handler. Torch's raises an error wherever the main thread is when a worker dies: a lock that
    is just taken there is never given back, and other threads wait for it forever.
    """
    others, started = set(active_children()), list[BaseProcess]()
    # Where there is no such signal, and in other threads, torch sets no handler.
    settable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if settable else None
    try:
        yield started
    finally:
        started += [child for child in active_children() if child not in others]
        Finalize(None, _end, args=[WeakSet(started)], exitpriority=0)
        if handler is not None:  # None: also one that is not of Python
            signal.signal(signal.SIGCHLD, handler)


def _end(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _as_it_is(item: Item) -> Item:
    return item


def _stay(worker: int) -> None:
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
