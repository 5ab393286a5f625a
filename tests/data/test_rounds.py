import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from contracap.data import rounds as module
from contracap.data.rounds import rounds
from contracap.data.workers import WorkerError

QUICKLY = 10.0  # seconds; a worker that is dead is found after one or two, or never


class Counted:
    """Endless: the worker, a count, and some bytes."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        worker, count = get_worker_info(), 0
        while True:
            yield (-1 if worker is None else worker.id), count, bytes(self.size)
            count += 1


class Failing:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        raise self.error("no such thing")
        yield


def new_children(action: Callable[[], object]) -> list[Any]:
    others = multiprocessing.active_children()
    action()
    return [child for child in multiprocessing.active_children() if child not in others]


def test_workers_take_turns() -> None:
    with closing(rounds(Counted(), 2)) as made:
        for count, items in enumerate(islice(made, 7)):
            assert items == [(worker, count, b"") for worker in range(2)]
    with closing(rounds(Counted(), 0)) as made:
        assert list(islice(made, 3)) == [[(-1, count, b"")] for count in range(3)]


def test_closing_ends_the_workers_and_leaves_nothing_open() -> None:
    def some() -> int:
        with closing(rounds(Counted(), 2)) as made:
            assert len(new_children(lambda: next(made))) == 2
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    assert not new_children(some)
    assert some() == some() == some()


@pytest.mark.parametrize("size", [0, 1_000_000])  # of 1 MB a pipe holds a part: the worker is killed while it writes
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_an_error_of_the_next_round(size: int, workers: int) -> None:
    with closing(rounds(Counted(size), workers)) as made:
        started = new_children(lambda: next(made))
        time.sleep(0.5)  # until they wait: those with large items in the midst of one
        os.kill(started[-1].pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=f"process {started[-1].pid}: ended by SIGKILL"):
            for _ in range(20):
                next(made)
        assert time.monotonic() - start < QUICKLY
    for child in started:
        child.join(QUICKLY)
        assert child.exitcode is not None, "the others are of no use"


class Slow:
    """Two items, of which the first worker makes the second slowly, when the other one, of two, has ended or failed."""

    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error

    def __iter__(self) -> Iterator[str]:
        worker = get_worker_info()
        assert worker is not None
        yield "first"
        if worker.id == 0:
            time.sleep(1.0)
        elif self.error is not None:
            raise self.error("no such thing")
        yield "last"


def test_what_a_worker_said_before_it_ended_comes_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.02)
    with closing(rounds(Slow(None), 2)) as made:
        assert [next(made), next(made)] == [["first", "first"], ["last", "last"]]
    with closing(rounds(Slow(FileNotFoundError), 2)) as made:
        assert next(made) == ["first", "first"]
        with pytest.raises(FileNotFoundError, match="no such thing"):
            next(made)


def asleep() -> Iterator[int]:
    yield 1
    time.sleep(60)
    yield 2


class Asleep:
    __iter__ = staticmethod(asleep)


def test_closing_waits_for_no_item() -> None:
    with closing(rounds(Asleep(), 2)) as made:
        workers = new_children(lambda: next(made))
        start = time.monotonic()
    for worker in workers:
        worker.join(QUICKLY)
    assert time.monotonic() - start < QUICKLY


def test_a_copy_of_the_process_ends_no_workers() -> None:
    with closing(rounds(Counted(), 2)) as made:
        next(made)
        copy = multiprocessing.get_context("fork").Process(target=made.close)
        copy.start()
        copy.join(QUICKLY)
        assert copy.exitcode == 0
        assert next(made) == [(worker, 1, b"") for worker in range(2)]


def test_a_worker_that_is_killed_is_an_error_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    # A handler that torch's loader has set raises the error wherever the program is, perhaps with a lock in its hands.
    calls = []
    before = signal.signal(signal.SIGCHLD, lambda *_: calls.append(1))
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process
    try:
        with closing(rounds(Counted(), 2)) as made:
            worker = new_children(lambda: next(made))[0]
            worker.kill()
            worker.join()
            assert calls, "the handler that was there is called"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_closing_is_no_death_to_torch_s_handler_of_another_loader() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    monitored = list[str]()

    def handler(number: int, frame: object) -> None:
        try:
            signal_handling._error_if_any_worker_fails()
        except RuntimeError as error:
            monitored.append(str(error))

    signal.signal(signal.SIGCHLD, handler)
    try:
        with closing(rounds(Asleep(), 2)) as made:
            workers = new_children(lambda: next(made))
        for worker in workers:
            worker.join(QUICKLY)
        assert [worker.exitcode for worker in workers] == [0, 0] and not monitored
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_workers_stay_when_a_scheduler_asks_them_to_end() -> None:
    with closing(rounds(Counted(), 2)) as made:
        for worker in new_children(lambda: next(made)):
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, number)
        for _ in range(5):
            next(made)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, FileNotFoundError, EOFError, ConnectionResetError])
def test_an_error_in_a_worker_that_lives_is_not_called_its_death(error: type[Exception], workers: int) -> None:
    with pytest.raises(error, match="no such thing"):
        next(rounds(Failing(error), workers))


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError(111, "refused"), RuntimeError("DataLoader")])
def test_an_error_of_a_pipe_whose_other_end_is_dead_is_its_death(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with closing(rounds(Counted(), 2)) as made:
        worker = new_children(lambda: next(made))[1]

        def fails(*_: Any) -> None:
            worker.kill()
            raise error

        monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_get_data", fails)
        with pytest.raises(WorkerError, match="ended by SIGKILL"):
            next(made)


@pytest.mark.parametrize(("last", "status"), [("", 0), ("1 / 0", 1)])
def test_a_program_ends_though_it_refers_to_the_workers(last: str, status: int) -> None:
    program = f"""
from itertools import count
from contracap.data import rounds as module
from contracap.data.rounds import rounds

made = rounds(count(), 2)
next(made)
{last}
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == status


kept: list[Iterator[Any]] = []


def keep_workers() -> None:
    kept.append(rounds(Counted(), 2))
    next(kept[0])


def test_a_process_of_a_program_ends_though_it_refers_to_the_workers() -> None:
    process = multiprocessing.get_context("spawn").Process(target=keep_workers)
    process.start()
    process.join(60)
    assert process.exitcode == 0
