"""Work on many shards at once, a process for each core."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A worker process that is no more."""


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """What `function` makes of each task, in the order in which they are done.

    A worker gets its next task when it has done one: after an error, or when the caller stops, only the tasks at work
    are finished.

    Args:
        function: one that can be pickled, as its tasks and results.
        tasks: taken one by one.
        workers: processes; 0: the calling one, task by task.

    Raises:
        ValueError: if `workers` is below 0.
        WorkerError: if a worker dies, as when the system lacks memory.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, is {workers}")
    if workers == 0:
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    # Not forked: a copy of a process with threads, as those of torch and fsspec, may never get their locks.
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
