import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.data.loader_workers import run_workers
from contracap.data.workers import WorkerError

QUICKLY = 10.0  # seconds; a worker that is dead is found at once, or never


def counted(worker: int, workers: int, size: int = 0) -> Iterator[tuple[int, int, int, bytes]]:
    for count in itertools.count():
        yield worker, workers, count, bytes(size)


def failing(worker: int, workers: int, error: Exception) -> Iterator[int]:
    yield 1
    raise error


def new_children(action: Callable[[], object]) -> list[Any]:
    others = multiprocessing.active_children()
    action()
    return [child for child in multiprocessing.active_children() if child not in others]


def test_workers_take_turns() -> None:
    for workers in (0, 1, 3):
        with closing(run_workers(counted, workers)) as made:
            for count, items in enumerate(islice(made, 7)):
                assert items == [(worker, max(1, workers), count, b"") for worker in range(max(1, workers))]


def test_tensors_come_in_shared_memory_also_from_a_worker_that_has_failed_since() -> None:
    with closing(run_workers(tensors, 1)) as made:
        (first,) = next(made)
        time.sleep(0.2)  # until it has failed
        (second,) = next(made)
        assert first.is_shared() and first.tolist() == [0, 0, 0] and second.tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="no third"):
            next(made)


def tensors(worker: int, workers: int) -> Iterator[torch.Tensor]:
    yield torch.zeros(3)
    yield torch.ones(3)
    raise ValueError("no third")


def test_closing_ends_the_workers_and_leaves_nothing_open() -> None:
    def some() -> int:
        with closing(run_workers(counted, 2)) as made:
            assert len(new_children(lambda: next(made))) == 2
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    assert not new_children(some)
    assert some() == some()


def test_the_signal_that_ended_a_worker_is_named_or_numbered() -> None:
    with closing(run_workers(counted, 1)) as made:
        os.kill(new_children(lambda: next(made))[0].pid, signal.SIGRTMIN + 3)
        with pytest.raises(WorkerError, match="ended by signal 37"):
            for _ in range(5):
                next(made)


@pytest.mark.parametrize(("size", "workers"), [(0, 1), (1_000_000, 2)])  # 1 MB: the worker is killed while it writes
def test_a_worker_that_is_killed_is_an_error_of_the_next_round(size: int, workers: int) -> None:
    with closing(run_workers(partial(counted, size=size), workers)) as made:
        started = new_children(lambda: next(made))
        time.sleep(0.2)  # until they wait: those with large items in the midst of one
        os.kill(started[-1].pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=f"process {started[-1].pid}: ended by SIGKILL"):
            for _ in range(20):
                next(made)
        assert time.monotonic() - start < QUICKLY
    for child in started:
        child.join(QUICKLY)
        assert child.exitcode is not None, "the others are of no use"


def slow(worker: int, workers: int, error: Exception | None) -> Iterator[str]:
    """Two items, of which the first worker makes the second slowly, when the other one, of two, has ended or failed."""
    yield "first"
    if worker == 0:
        time.sleep(0.3)
    elif error is not None:
        raise error
    yield "last"


def test_what_a_worker_said_before_it_ended_comes_in_its_turn() -> None:
    with closing(run_workers(partial(slow, error=None), 2)) as made:
        assert [next(made), next(made)] == [["first", "first"], ["last", "last"]]
    with closing(run_workers(partial(slow, error=FileNotFoundError("no such thing")), 2)) as made:
        assert next(made) == ["first", "first"]
        with pytest.raises(FileNotFoundError, match="no such thing"):
            next(made)


def asleep(worker: int, workers: int) -> Iterator[int]:
    yield 1
    time.sleep(60)
    yield 2


def test_closing_waits_for_no_item() -> None:
    with closing(run_workers(asleep, 2)) as made:
        workers = new_children(lambda: next(made))
        start = time.monotonic()
    for worker in workers:
        worker.join(QUICKLY)
    assert time.monotonic() - start < QUICKLY


def test_a_copy_of_the_process_ends_no_workers() -> None:
    with closing(run_workers(counted, 2)) as made:
        next(made)
        copy = multiprocessing.get_context("fork").Process(target=made.close)
        copy.start()
        copy.join(QUICKLY)
        assert copy.exitcode == 0
        assert next(made) == [(worker, 2, 1, b"") for worker in range(2)]


def test_workers_stay_when_all_processes_are_asked_to_end() -> None:
    with closing(run_workers(counted, 2)) as made:
        for worker in new_children(lambda: next(made)):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(worker.pid, number)
        for _ in range(5):
            next(made)


@pytest.mark.parametrize("make", [asleep, partial(counted, size=1_000_000)], ids=["at work", "writing"])
def test_workers_end_with_the_process_that_asks(make: Callable[[int, int], Iterator[Any]]) -> None:
    process = multiprocessing.get_context("fork").Process(target=kill_this_process, args=(make,))
    process.start()
    process.join(300)
    # The sentinel of a process is a pipe that its children inherit: it is ready when they, too, have ended.
    assert process.exitcode == -signal.SIGKILL and multiprocessing.connection.wait([process.sentinel], QUICKLY)


def kill_this_process(make: Callable[[int, int], Iterator[Any]]) -> None:
    made = run_workers(make, 2)
    next(made)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_program_that_fails_ends_though_it_refers_to_workers_and_leaves_nothing_on_disk(tmp_path: Path) -> None:
    program = """
import time, torch
from contracap.data.loader_workers import run_workers

def make(worker, workers):
    yield torch.zeros(3)
    time.sleep(60)

run_workers(make, 2)
for _ in range(2):
    made = run_workers(make, 2)
    next(made)
    made.close()
made = run_workers(make, 2)
next(made)
1 / 0
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr
    assert not list(tmp_path.iterdir())


def process_ids(worker: int, workers: int) -> Iterator[int]:
    while True:
        yield os.getpid()


def test_workers_may_start_in_several_threads_at_once() -> None:
    def kill_first(_: int) -> str:
        with closing(run_workers(process_ids, 2)) as made:
            first, second = next(made)
            assert len({first, second, os.getpid()}) == 3
            os.kill(first, signal.SIGKILL)
            with pytest.raises(WorkerError) as caught:
                for _ in range(5):
                    next(made)
            return str(caught.value)

    with ThreadPoolExecutor(3) as threads:
        assert all("ended by SIGKILL" in said for said in threads.map(kill_first, range(4)))


def no_items(worker: int, workers: int) -> Iterator[int]:
    raise FileNotFoundError("no shards at all")


class Particular(Exception):
    def __init__(self, number: int, *, shard: str) -> None:
        super().__init__(f"{number} in {shard}")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [FileNotFoundError, EOFError])
def test_an_error_in_a_worker_is_raised_as_it_is(error: type[Exception], workers: int) -> None:
    with closing(run_workers(partial(failing, error=error("no such thing")), workers)) as made:
        next(made)
        with pytest.raises(error, match="no such thing") as caught:
            next(made)
    assert ("In a worker" in "".join(getattr(caught.value, "__notes__", []))) == bool(workers)


def test_an_error_or_an_item_that_cannot_be_sent_is_an_error() -> None:
    with closing(run_workers(partial(failing, error=Particular(3, shard="a.tar")), 1)) as made:
        next(made)
        with pytest.raises(RuntimeError, match=r"Particular: 3 in a\.tar"):
            next(made)
    with closing(run_workers(no_items, 1)) as made, pytest.raises(FileNotFoundError, match="no shards at all"):
        next(made)
    with closing(run_workers(partial(failing, error=ValueError("bad", torch.ones(2))), 1)) as made:
        next(made)
        with pytest.raises(ValueError, match="bad") as caught:
            next(made)
        assert caught.value.args[1].tolist() == [1, 1]
    with (
        closing(run_workers(lambda worker, workers: iter([lambda: None]), 1)) as made,
        pytest.raises((AttributeError, pickle.PicklingError), match="local object"),
    ):
        next(made)


kept: list[Iterator[Any]] = []


def keep_workers() -> None:
    kept.append(run_workers(counted, 2))
    next(kept[0])


def test_a_process_of_a_program_ends_though_it_refers_to_the_workers() -> None:
    process = multiprocessing.get_context("fork").Process(target=keep_workers)
    process.start()
    process.join(300)
    assert process.exitcode == 0
