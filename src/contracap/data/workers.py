"""Process pools for shards, and thread pools that prepare images ahead of the model.

Threads are enough for images: files, sockets, the JPEG decoder and resizing release the interpreter's lock, and pixels
need not be copied between processes.
"""

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import get_context
from queue import SimpleQueue
from typing import TypeVar

AHEAD = min(8, os.cpu_count() or 1)  # batches that are prepared at a time, each in a thread
PATIENCE = 2.0  # seconds in which threads may end; one may wait for a silent server

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A worker process that has died."""


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield what `function` makes of each task, in the order in which they are done.

    A worker gets its next task when it has done one. After an error, or when the caller stops, only running tasks are
    finished.

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
    tasks = iter(tasks)
    # Not forked: in a copy of a process with threads, such as torch's and fsspec's, locks may stay closed.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            running = {pool.submit(function, task) for task in islice(tasks, workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(function, task) for task in islice(tasks, len(done))}
                yield from [future.result() for future in done]
        except BrokenProcessPool:
            reason = "a worker process died, perhaps for want of memory: try again with fewer workers"
            raise WorkerError(reason) from None


@contextmanager
def prepared(
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
