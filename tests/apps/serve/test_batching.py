import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from contracap.apps.serve.batching import Batcher, BatchError, BatchingConfig, PriorityLock


class Work:
    """Doubles its items, remembers its batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def double(self, settings: str, items: list[int], go_on: Callable[[], None]) -> list[int]:
        self.batches.append((settings, items))
        self.started.set()
        assert self.go_on.wait(10)
        if 13 in items:
            raise ZeroDivisionError("13 brings bad luck")
        return [2 * item for item in items]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


async def running(work: Work) -> None:
    """Returns once a batch runs."""
    assert await asyncio.to_thread(work.started.wait, 10)


async def queued(batcher: Batcher, count: int) -> None:
    """Returns once so many requests wait."""
    while batcher.waiting != count:
        await asyncio.sleep(0)


def test_requests_that_arrive_together_share_a_batch_if_their_settings_are_equal():
    work, sizes = Work(), []

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=50.0), observe=sizes.append) as batcher:
            requests = [("a", 1), ("b", 2), ("a", 3), ("b", 4), ("a", 5)]
            answers = await asyncio.gather(*(batcher.submit(work.double, *request) for request in requests))
            assert answers == [2, 4, 6, 8, 10]

    run(test())
    assert work.batches == [("a", [1, 3, 5]), ("b", [2, 4])]
    assert sizes == [3, 2]


@pytest.mark.parametrize(
    ("most", "batches"), [(4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]), (2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])]
)
def test_a_batch_is_never_larger_than_max_batch_nor_its_items_allow_and_the_oldest_go_first(most, batches):
    work = Work()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_batch=4, max_wait_ms=20.0)) as batcher:
            answers = await asyncio.gather(
                *(batcher.submit(work.double, "a", item, max_items=most) for item in range(10))
            )
            assert answers == [2 * item for item in range(10)]

    run(test())
    assert [items for _, items in work.batches] == batches


def test_a_full_batch_does_not_wait():
    work = Work()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_batch=2, max_wait_ms=60_000.0)) as batcher:
            assert await asyncio.gather(*(batcher.submit(work.double, "a", item) for item in (1, 2))) == [2, 4]

    run(test())


def test_a_lone_request_waits_for_others_no_longer_than_max_wait():
    work = Work()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=200.0)) as batcher:
            start = asyncio.get_running_loop().time()
            assert await batcher.submit(work.double, "a", 1) == 2
            assert 0.19 <= asyncio.get_running_loop().time() - start < 5

    run(test())


def test_what_arrives_while_a_batch_runs_is_the_next_batch():
    work = Work()
    work.go_on.clear()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=0.0)) as batcher:
            first = asyncio.create_task(batcher.submit(work.double, "a", 0))
            await running(work)
            others = [asyncio.create_task(batcher.submit(work.double, "a", item)) for item in (1, 2, 3)]
            await queued(batcher, 3)
            work.go_on.set()
            assert await asyncio.gather(first, *others) == [0, 2, 4, 6]

    run(test())
    assert [items for _, items in work.batches] == [[0], [1, 2, 3]]


def test_a_failing_batch_fails_its_own_requests_only_and_the_reason_goes_to_the_log(caplog):
    work = Work()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=20.0)) as batcher:
            requests = [("a", 12), ("a", 13), ("b", 14)]
            answers = await asyncio.gather(
                *(batcher.submit(work.double, *request) for request in requests), return_exceptions=True
            )
            assert [type(answer) for answer in answers] == [BatchError, BatchError, int]
            assert "bad luck" not in str(answers[0])
            assert await batcher.submit(work.double, "a", 15) == 30

    with caplog.at_level(logging.ERROR):
        run(test())
    assert [record.message for record in caplog.records] == ["a batch of 2 requests failed"]
    assert "13 brings bad luck" in caplog.text


def test_a_request_that_is_cancelled_leaves_the_queue():
    work = Work()
    work.go_on.clear()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=0.0)) as batcher:
            first = asyncio.create_task(batcher.submit(work.double, "a", 0))
            await running(work)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batcher.submit(work.double, "a", 1), 0.01)
            assert batcher.waiting == 0
            last = asyncio.create_task(batcher.submit(work.double, "a", 2))
            await queued(batcher, 1)
            work.go_on.set()
            assert await asyncio.gather(first, last) == [0, 4]

    run(test())
    assert [items for _, items in work.batches] == [[0], [2]]


def test_a_request_that_is_cancelled_while_its_batch_runs_does_not_disturb_the_others():
    work = Work()
    work.go_on.clear()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_batch=2, max_wait_ms=60_000.0)) as batcher:
            leaves, stays = (asyncio.create_task(batcher.submit(work.double, "a", item)) for item in (1, 2))
            await running(work)
            leaves.cancel()
            await asyncio.wait([leaves])
            work.go_on.set()
            assert leaves.cancelled() and await stays == 4

    run(test())


def test_work_that_nobody_waits_for_any_more_ends_at_its_next_step():
    started, ended = threading.Event(), threading.Event()

    def endless(settings: str, items: list[int], go_on: Callable[[], None]) -> list[int]:
        try:
            while True:
                go_on()
                started.set()
                time.sleep(0.001)
        finally:
            ended.set()

    async def test() -> None:
        async with Batcher(BatchingConfig(max_wait_ms=0.0)) as batcher:
            call = asyncio.create_task(batcher.submit(endless, "a", 1))
            assert await asyncio.to_thread(started.wait, 10)
            call.cancel()
            assert await asyncio.to_thread(ended.wait, 10)
            assert await batcher.submit(Work().double, "a", 2) == 4

    run(test())


def test_heavy_work_gives_way_to_light_work_between_its_steps():
    lock, order = PriorityLock(), []
    light_waits = threading.Event()

    def heavy_work(settings: str, items: list[int], go_on: Callable[[], None]) -> list[int]:
        order.append("heavy begins")
        assert light_waits.wait(10)
        end = time.monotonic() + 10
        while "light" not in order and time.monotonic() < end:
            time.sleep(0.001)
            go_on()
        order.append("heavy ends")
        return items

    def light_work(settings: str, items: list[int], go_on: Callable[[], None]) -> list[int]:
        order.append("light")
        return items

    async def test() -> None:
        config = BatchingConfig(max_wait_ms=0.0)
        async with Batcher(config, lock=lock) as light, Batcher(config, lock=lock, heavy=True) as heavy:
            first = asyncio.create_task(heavy.submit(heavy_work, "a", 1))
            while not order:
                await asyncio.sleep(0.001)
            second = asyncio.create_task(light.submit(light_work, "a", 2))
            await asyncio.sleep(0.01)
            assert order == ["heavy begins"]
            light_waits.set()
            assert await asyncio.gather(first, second) == [1, 2]

    run(test())
    assert order == ["heavy begins", "light", "heavy ends"]
