"""Worker processes that make endless items in turn.

Torch's loader is not used: its handler of SIGCHLD raises an error wherever the main thread is when a worker dies,
perhaps with a lock in its hands; and its workers share a pipe and locks, which one that dies takes with it. Here each
has a pipe of its own, which ends when it dies.
"""

import io
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, multiprocessing

from contracap.data.workers import WorkerError

AHEAD = 2  # items that a worker makes before they are taken
GRACE = 0.1  # seconds that workers get to end in by themselves
PAUSE = 0.5  # seconds between looks whether the parent lives
PATIENCE = 5.0  # seconds until the system has ended a process whose pipe has ended, or that was killed

_starting = threading.Lock()  # a process that is started meanwhile would have the ends of another's pipe

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
            until = time.monotonic() + GRACE
            for worker in started:
                worker.end(until)


class _Worker(Generic[Item]):
    """A process that makes items, and this process's end of the pipe between."""

    def __init__(
        self, make: Callable[[int, int], Iterator[Item]], number: int, workers: int, others: Sequence[Connection]
    ) -> None:
        with _starting:
            self.pipe, its_own = multiprocessing.Pipe()
            with its_own:  # which no other process may have, or it would not end with the worker
                self._process = multiprocessing.Process(
                    target=_work, args=(its_own, [*others, self.pipe], make, number, workers), daemon=True
                )
                # At its end `multiprocessing` waits for workers, which do not heed its SIGTERM.
                self._at_exit = Finalize(None, _kill, args=[self._process], exitpriority=0)
                self._process.start()
        for _ in range(AHEAD):
            self._ask(True)

    def take(self) -> Item:
        """Its next item."""
        try:
            found = _Unpickler(self.pipe).load()
        except (EOFError, OSError) as error:
            self._process.join(PATIENCE)
            if self._process.exitcode is None and not isinstance(error, EOFError | ConnectionError):
                raise
            raise WorkerError(f"process {self._process.pid}: {_ended(self._process.exitcode)}") from None
        if isinstance(found, _Failure):
            raise found.error
        self._ask(True)
        return found

    def dismiss(self) -> None:
        """Let it end when it has made the item that it is at."""
        self._ask(False)
        self.pipe.close()

    def end(self, until: float) -> None:
        """Wait for that until then, by the monotonic clock, and no longer."""
        self._process.join(max(0.0, until - time.monotonic()))
        _kill(self._process)
        self._process.join(PATIENCE)
        self._at_exit.cancel()

    def _ask(self, more: bool) -> None:
        with suppress(OSError):  # it is dead, and its pipe says so when it is read
            self.pipe.send(more)


def _ended(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {'unknown' if status is None else status}"
    known = {number.value: number.name for number in signal.Signals}
    return f"ended by {known.get(-status, f'signal {-status}')}"


def _kill(process: multiprocessing.Process) -> None:
    if process.pid is not None:  # None: it could not be started
        process.kill()


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
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    items = _items(make, number, workers)
    with suppress(EOFError, ConnectionError):  # the process that asks is dead
        while pipe.recv():
            _next(items).send(pipe)


def _end_with(parent: int) -> None:
    """End this process when its parent has: at work on an item, it would notice only later, if ever."""
    while os.getppid() == parent:
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGKILL)


def _items(make: Callable[[int, int], Iterator[Item]], number: int, workers: int) -> Iterator[Item]:
    """Starts with the first item, so that an error of `make` itself is told, too."""
    yield from make(number, workers)


class _Pickler(ForkingPickler):
    """Leaves tensors out, which are handed over as shared memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors = list[Tensor]()

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if (
            not isinstance(value, Tensor)
            or not value.numel()
            or multiprocessing.get_sharing_strategy() != "file_descriptor"
        ):
            return None
        size = value.numel() * value.element_size()
        alone = value.is_contiguous() and value.untyped_storage().nbytes() == size
        self.tensors.append(value if alone else value.clone(memory_format=torch.contiguous_format))
        return value.dtype, tuple(value.shape), size


class _Message:
    """An item, pickled, and the tensors in it.

    Torch would hand these over through a socket with a name, which a worker that is killed leaves on the disk.
    """

    def __init__(self, item: Any) -> None:
        self._content = io.BytesIO()
        pickler = _Pickler(self._content)
        pickler.dump(item)
        self._tensors = pickler.tensors

    def send(self, pipe: Connection) -> None:
        pipe.send_bytes(self._content.getbuffer())
        for tensor in self._tensors:
            descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()
            send_handle(pipe, descriptor, None)


class _Unpickler(pickle.Unpickler):
    """Reads the next message of a pipe."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(io.BytesIO(pipe.recv_bytes()))
        self._pipe = pipe

    def persistent_load(self, left_out: Any) -> Tensor:
        dtype, shape, size = left_out
        descriptor, storages = recv_handle(self._pipe), cast(Any, torch.UntypedStorage)
        try:
            storage = storages._new_shared_fd_cpu(descriptor, size)
        finally:
            os.close(descriptor)
        return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _next(items: Iterator[Any]) -> _Message:
    """The next item, or why there is none, pickled."""
    try:
        return _Message(next(items))
    except Exception as error:
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(_Failure(error)))
        except Exception:  # of an exception whose class takes other arguments
            error = RuntimeError("".join(traceback.format_exception(error)))
        return _Message(_Failure(error))
