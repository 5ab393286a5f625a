"""Requests that arrive one by one go through the model together. Knows neither the model nor HTTP."""

import asyncio
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

Settings = TypeVar("Settings", bound=Hashable)
Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How requests go through the model together.

    Attributes:
        max_batch: pictures or texts at most.
        max_wait_ms: milliseconds that a request waits for others while the model is idle.
    """

    max_batch: int = 16
    max_wait_ms: float = 5.0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1 picture, not {self.max_batch}")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(f"max_wait_ms must be from 0 to 60000 milliseconds, not {self.max_wait_ms}")


class BatchError(RuntimeError):
    """The work on a batch failed; what went wrong is in the log."""


@dataclass(eq=False)
class _Request:
    """One item that waits for its answer.

    Attributes:
        group: the work and its settings; only requests of one group share a batch.
        deadline: when it goes, however few it goes with, on the event loop's clock in seconds.
    """

    group: tuple[Callable[..., list[Any]], Hashable]
    item: Any
    deadline: float
    answer: asyncio.Future[Any]


class Batcher:
    """Groups requests and runs one batch at a time in a thread of its own, while the event loop goes on.

    The oldest request decides which group is next. It goes when `max_batch` of its group are there, or when it has
    waited for `max_wait_ms`; all that arrive while a batch runs wait for its end anyway. A failure is that of its
    batch alone. Use it as `async with Batcher(...) as batcher`.

    Attributes:
        observe: is told the size of each batch.
    """

    def __init__(self, config: BatchingConfig, *, observe: Callable[[int], None] = lambda size: None):
        self.config, self.observe = config, observe
        self._waiting: dict[_Request, None] = {}  # in the order of arrival
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    async def __aenter__(self) -> "Batcher":
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        self._thread.shutdown(wait=False)

    async def submit(
        self, work: Callable[[Settings, list[Item]], list[Answer]], settings: Settings, item: Item
    ) -> Answer:
        """The answer to `item` in a batch, `work(settings, items)`. Who is cancelled leaves the queue.

        Raises: BatchError: if the work failed.
        """
        loop = asyncio.get_running_loop()
        request = _Request((work, settings), item, loop.time() + self.config.max_wait_ms / 1000, loop.create_future())
        self._waiting[request] = None
        self._arrived.set()
        try:
            return await request.answer
        finally:
            self._waiting.pop(request, None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            work, settings = batch[0].group
            self.observe(len(batch))
            try:
                answers = await loop.run_in_executor(self._thread, work, settings, [request.item for request in batch])
                done = list(zip(batch, answers, strict=True))
            except Exception:
                log.exception("a batch of %d requests failed", len(batch))
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(BatchError("the model failed on this request"))
            else:
                for request, answer in done:
                    if not request.answer.done():  # else its client has gone, or has waited for too long
                        request.answer.set_result(answer)

    async def _next(self) -> list[_Request]:
        """The next batch, once it is full or its oldest request has waited long enough."""
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            oldest = next(iter(self._waiting))
            batch = [request for request in self._waiting if request.group == oldest.group][: self.config.max_batch]
            left = oldest.deadline - asyncio.get_running_loop().time()
            if len(batch) == self.config.max_batch or left <= 0:
                for request in batch:
                    del self._waiting[request]
                return batch
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()
