import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from os import _exit
from pathlib import Path
from time import sleep

import pytest

from contracap.data import workers
from contracap.data.workers import WorkerError, in_processes, in_threads, prepare_ahead


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    assert sorted(in_processes(abs, range(-9, 0), workers)) == list(range(1, 10))


def test_tasks_are_taken_no_faster_than_they_are_done() -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    results = in_processes(abs, tasks(), 2)
    next(results)
    assert 3 <= len(taken) <= 4  # the two that were begun may be done at once
    before = len(taken)
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == before


def test_error_of_a_task_is_raised_and_ends_the_work() -> None:
    with pytest.raises(ValueError, match="must be non-negative"):
        list(in_processes(sleep, [0.0, -1.0, 0.0], 2))


def test_worker_that_dies_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerError, match="a worker process died"):
        list(in_processes(_exit, [1, 1], 2))


def test_less_than_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 0, is -1"):
        list(in_processes(abs, [1], -1))


def numbers(count: int, taken: list[int]) -> Generator[int, None, None]:
    for number in range(count):
        taken.append(number)
        yield number


def test_no_more_items_are_taken_than_are_soon_needed() -> None:
    taken = list[int]()
    read = in_threads(str, numbers(1000, taken), workers=2, ahead=5)
    for number in range(20):
        item, future = next(read)
        assert (item, future.result()) == (number, str(number))
    time.sleep(0.1)
    assert 20 <= len(taken) <= 20 + 5 + 1
    read.close()
    before = len(taken)
    time.sleep(0.05)
    assert len(taken) == before


def test_stopping_ends_the_threads_and_closes_the_items() -> None:
    closed, threads = threading.Event(), threading.active_count()

    def items() -> Generator[int, None, None]:
        try:
            yield from numbers(1000, [])
        finally:
            closed.set()

    read = in_threads(str, items(), workers=3, ahead=2)
    next(read)
    read.close()
    assert closed.is_set() and threading.active_count() <= threads


def test_a_thread_that_waits_for_a_silent_server_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.05)
    answer = threading.Event()
    read = in_threads(lambda number: number == 0 or answer.wait(30), numbers(9, []), workers=2, ahead=4)
    next(read)
    begun = time.monotonic()
    read.close()
    assert time.monotonic() - begun < 5
    answer.set()


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_prepared_in_their_order_and_ahead_of_who_takes_them(monkeypatch, ahead: int) -> None:
    monkeypatch.setattr(workers, "AHEAD", ahead)
    made = {number: threading.Event() for number in range(9)}

    def prepare(number: int) -> int:
        sleep(0.01 * (number % 3 == 0))  # the later ones may well be done before
        made[number].set()
        return -number

    with prepare_ahead(prepare, numbers(9, [])) as batches:
        for place, (number, result) in enumerate(batches):
            assert (number, result) == (place, -place)
            assert all(made[later].wait(10) for later in range(place, min(place + 1 + ahead, 9)))
    assert place == 8


@pytest.mark.parametrize("failing", ["batches", "prepare", "consumer", "nothing, but it stops early"])
def test_an_error_is_raised_in_its_place_and_leaves_no_thread(failing: str) -> None:
    threads, taken = threading.active_count(), list[int]()

    def batches() -> Generator[int, None, None]:
        for number in numbers(1000, []):
            if failing == "batches" and number == 3:
                raise OSError("gone")
            yield number

    def prepare(number: int) -> int:
        if failing == "prepare" and number == 3:
            raise OSError("gone")
        return number

    with suppress(OSError), prepare_ahead(prepare, batches()) as found:
        for number, _ in found:
            taken.append(number)
            if number == 2 and failing == "consumer":
                raise OSError("gone")
            if number == 2 and failing.startswith("nothing"):
                break
    assert taken == [0, 1, 2]
    assert threading.active_count() <= threads


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    program = (
        "from time import sleep; from contracap.data.workers import in_processes\n"
        "if __name__ == '__main__': [print('done', flush=True) for _ in in_processes(sleep, [0, 60, 60], 2)]"
    )
    (script := tmp_path / "parent.py").write_text(program)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline()
        parent.send_signal(number)
        assert parent.stdout.read() == b""  # ends when no process holds it
    assert parent.returncode == -number
