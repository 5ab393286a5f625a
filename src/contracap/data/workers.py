"""Process pools for shards, and thread pools that prepare images ahead of the model.

Threads are enough for images: files, sockets, the JPEG decoder and resizing release the interpreter's lock, and pixels
need not be copied between processes.

A pool for shards shares out tasks that end; `loader_workers` are another, for streams of batches without end. These
are in a fixed order, travel as shared memory, and outlive the signals that make a worker here leave its task.
"""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar, cast

AHEAD = min(8, os.cpu_count() or 1)  # batches that are prepared at a time, each in a thread
PATIENCE = 2.0  # seconds in which threads and processes may end; one may wait for a silent server
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A worker process that has died."""


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield what `function` makes of each task, in the order in which they are done.

    A worker gets its next task when it has done one. After an error, and when the caller stops or ends in any way, the
    workers leave their tasks and end.

    Args:
        function: must be picklable, like its tasks and results.
        tasks: taken one by one.
        workers: processes; 0 or 1: the calling one.

    Raises:
        ValueError: if `workers` is below 0.
        WorkerError: if a worker dies, as when the system lacks memory.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, is {workers}")
    if workers <= 1:
        yield from map(function, tasks)
        return
    tasks, started = iter(tasks), list[BaseProcess]()
    context = get_context("spawn")  # in a fork of a process with threads, such as torch's, locks may stay closed
    lifeline, held = context.Pipe(duplex=False)  # the workers end when nobody holds its other end
    try:
        busy = dict[Any, None]()  # pipes of the workers that have a task
        for task in islice(tasks, workers):
            pipe, other_end = context.Pipe()
            process = context.Process(target=_work, args=(other_end, lifeline, function), daemon=True)
            with _signals_blocked():
                process.start()
            started.append(process)
            other_end.close()
            busy[pipe] = None
            _send(pipe, task)
        while busy:
            for pipe in cast(list[Connection], wait(list(busy))):
                result = _receive(pipe)
                del busy[pipe]
                for task in islice(tasks, 1):
                    _send(pipe, task)
                    busy[pipe] = None
                yield result
    finally:
        held.close()
        end = time.monotonic() + 2 * PATIENCE  # after `PATIENCE` a worker ends itself, unless it is still starting
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def _send(pipe: Connection, message: Any) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the worker has died, which `_receive` will tell
        pipe.send(message)


def _receive(pipe: Connection) -> Any:
    """Return the next result of a worker, or raise its error."""
    try:
        result, error = pipe.recv()
    except (EOFError, ConnectionResetError):
        reason = "a worker process died, perhaps for want of memory: try again with fewer workers"
        raise WorkerError(reason) from None
    if error is not None:
        raise error
    return result


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A context that holds back the signals to end; a process that starts in it never gets them before `_work`."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, lifeline: Connection, function: Callable[[Any], Any]) -> None:
    """Do the tasks that come through the pipe, in a worker.

    Ctrl-C and SIGTERM reach all processes of a terminal or a job. Only the first process heeds them: when it ends, or
    needs no more results, the lifeline ends, and the worker leaves its task and removes its temporary files.
    """
    abandoned = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if abandoned.is_set():
            abandoned.clear()  # a second signal must not interrupt the removal of files
            raise SystemExit

    def watch() -> None:
        wait([lifeline])
        abandoned.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)  # the task hangs

    for number in END_SIGNALS:
        signal.signal(number, leave)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    threading.Thread(target=watch, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task, result, error = pipe.recv(), None, None
            try:
                result = function(task)
            except Exception as raised:
                raised.add_note(f"In a worker process:\n{traceback.format_exc()}")
                error = raised
            pipe.send((result, error))
    for number in END_SIGNALS:  # nothing disturbs the end of the interpreter
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def prepare_ahead(
    prepare: Callable[[Task], Result], batches: Generator[Task, None, None]
) -> Iterator[Iterator[tuple[Task, Result]]]:
    """Yield, within the block, batches in order with what `prepare` makes of them, up to `AHEAD` ahead of their use.

    An error is raised in its place. The threads end with the block.
    """
    with closing(in_threads(prepare, batches, workers=AHEAD, ahead=AHEAD)) as made:
        yield ((batch, future.result()) for batch, future in made)


def in_threads(
    function: Callable[[Task], Result], items: Generator[Task, None, None], *, workers: int, ahead: int
) -> Generator[tuple[Task, "Future[Result]"], None, None]:
    """Yield each item with a future of what `function` makes of it, in order. Another thread takes the items.

    At most `ahead` items are taken before the caller gets them. An error of `items` is raised in its place.
    """
    ordered = SimpleQueue[tuple[Task, Future[Result]] | BaseException | None]()
    tasks = SimpleQueue[tuple[Task, Future[Result]] | None]()
    room, stopped = threading.Semaphore(ahead), threading.Event()

    def feed() -> None:  # closes the items in their thread: the shell command of a shard must end
        end: BaseException | None = None
        try:
            with closing(items):
                for item in items:
                    room.acquire()
                    if stopped.is_set():
                        break
                    task = (item, Future[Result]())
                    ordered.put(task)
                    tasks.put(task)
        except BaseException as error:
            end = error
        ordered.put(end)
        for _ in range(workers):
            tasks.put(None)

    def work() -> None:
        while (task := tasks.get()) is not None:
            if not stopped.is_set():
                item, future = task
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=target, daemon=True) for target in (feed, *[work] * workers)]
    for thread in threads:
        thread.start()
    try:
        while (entry := ordered.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            room.release()
            yield entry
    finally:
        stopped.set()
        room.release()
        end = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
