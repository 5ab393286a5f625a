from collections.abc import Iterator
from os import _exit
from time import sleep

import pytest

from contracap.data.workers import WorkerError, in_processes


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    assert sorted(in_processes(abs, range(-9, 0), workers)) == list(range(1, 10))


def test_tasks_are_taken_no_faster_than_they_are_done() -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    results = in_processes(abs, tasks(), 1)
    next(results)
    assert len(taken) == 2
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 2


def test_error_of_a_task_is_raised_and_ends_the_work() -> None:
    with pytest.raises(ValueError, match="must be non-negative"):
        list(in_processes(sleep, [0.0, -1.0, 0.0], 1))


def test_worker_that_dies_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerError, match="a worker process died"):
        list(in_processes(_exit, [1], 1))


def test_less_than_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 0, is -1"):
        list(in_processes(abs, [1], -1))
