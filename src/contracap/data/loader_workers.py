"""The loader's worker processes, which make the parts of batches.

Torch's loader is not used. Its handler of SIGCHLD raises an error wherever the main thread is when a worker dies,
perhaps while it holds a lock; and its workers share a pipe and locks, which break when one dies. Here each worker has
a pipe of its own, which ends when the worker dies. `workers.in_processes` cannot serve here: its workers keep no state
between tasks, and leave their task on a signal.
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

AHEAD = 2  # parts that a worker makes before they are taken
GRACE = 0.1  # seconds in which workers may end by themselves
PAUSE = 0.5  # seconds between checks that the parent is alive
PATIENCE = 5.0  # seconds in which a process must end whose pipe has ended, or that was killed

_starting = threading.Lock()  # a process that starts at the same time would inherit the ends of another's pipe

Part = TypeVar("Part")


def run_workers(make: Callable[[int, int], Iterator[Part]], workers: int) -> Generator[list[Part], None, None]:
    """Yield lists with a part of each worker, in their order, without end. With 0 workers, this process makes them.

    Workers ignore the signals that ask a process to end: a scheduler sends them to all processes, but a run has a step
    to finish. They end when this generator is closed or the program ends, without finishing a part.

    Args:
        make: called with a worker's number and the number of workers; yields its parts. They are pickled.

    Raises:
        WorkerError: if a worker died before it made its part.
        Exception: of `make`; a note holds the traceback of a worker.
    """
    if not workers:
        yield from ([part] for part in make(0, 1))
        return
    started, here = list[_Worker[Part]](), os.getpid()
    try:
        for number in range(workers):
            started.append(_Worker(make, number, workers, [worker.pipe for worker in started]))
        while True:
            yield [worker.take() for worker in started]
    finally:
        if os.getpid() == here:  # not in a forked copy, whose workers they are not
            for worker in started:
                worker.dismiss()
            until = time.monotonic() + GRACE
            for worker in started:
                worker.end(until)


class _Worker(Generic[Part]):
    """A worker process, and this process's end of the pipe to it."""

    def __init__(
        self, make: Callable[[int, int], Iterator[Part]], number: int, workers: int, others: Sequence[Connection]
    ) -> None:
        with _starting:
            self.pipe, other_end = multiprocessing.Pipe()
            with other_end:  # no other process may have it, or the pipe would not end with the worker
                self._process = multiprocessing.Process(
                    target=_work, args=(other_end, [*others, self.pipe], make, number, workers), daemon=True
                )
                # At its end `multiprocessing` waits for workers, which do not heed its SIGTERM.
                self._at_exit = Finalize(None, _kill, args=[self._process], exitpriority=0)
                self._process.start()
        for _ in range(AHEAD):
            self._ask(True)

    def take(self) -> Part:
        """Return its next part."""
        try:
            part = _Unpickler(self.pipe).load()
        except (EOFError, OSError) as error:
            self._process.join(PATIENCE)
            if self._process.exitcode is None and not isinstance(error, EOFError | ConnectionError):
                raise
            raise WorkerError(f"process {self._process.pid}: {_describe_end(self._process.exitcode)}") from None
        if isinstance(part, _Failure):
            raise part.error
        self._ask(True)
        return part

    def dismiss(self) -> None:
        """Let it end after the part that it is making."""
        self._ask(False)
        self.pipe.close()

    def end(self, until: float) -> None:
        """Wait for its end until a time of the monotonic clock, then kill it."""
        self._process.join(max(0.0, until - time.monotonic()))
        _kill(self._process)
        self._process.join(PATIENCE)
        self._at_exit.cancel()

    def _ask(self, more: bool) -> None:
        with suppress(OSError):  # it is dead, and reading its pipe will tell
            self.pipe.send(more)


def _describe_end(status: int | None) -> str:
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
    """Make a part each time that the pipe asks for one, in a worker."""
    for other in others:
        other.close()
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    parts = _make_parts(make, number, workers)
    with suppress(EOFError, ConnectionError):  # the process that asks is dead
        while pipe.recv():
            _next_message(parts).send(pipe)


def _end_with_parent(parent: int) -> None:
    """End this process when its parent has ended: while it makes a part, it would not notice."""
    while os.getppid() == parent:
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGKILL)


def _make_parts(make: Callable[[int, int], Iterator[Part]], number: int, workers: int) -> Iterator[Part]:
    """Call `make` with the first part, so that its own errors are sent, too."""
    yield from make(number, workers)


class _Pickler(ForkingPickler):
    """A pickler that leaves out tensors, which are sent as shared memory."""

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
    """A pickled part and its tensors.

    Torch would send these through a named socket, which a killed worker leaves on the disk.
    """

    def __init__(self, part: Any) -> None:
        self._content = io.BytesIO()
        pickler = _Pickler(self._content)
        pickler.dump(part)
        self._tensors = pickler.tensors

    def send(self, pipe: Connection) -> None:
        pipe.send_bytes(self._content.getbuffer())
        for tensor in self._tensors:
            descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()
            send_handle(pipe, descriptor, None)


class _Unpickler(pickle.Unpickler):
    """An unpickler of the next message in a pipe."""

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


def _next_message(parts: Iterator[Any]) -> _Message:
    """Return the next part, or the error in its place, pickled."""
    try:
        return _Message(next(parts))
    except Exception as error:
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(_Failure(error)))
        except Exception:  # of an exception whose class takes other arguments
            error = RuntimeError("".join(traceback.format_exception(error)))
        return _Message(_Failure(error))
