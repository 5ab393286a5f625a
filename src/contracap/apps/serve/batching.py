"""Batches of requests that arrive one by one. Knows neither the model nor HTTP."""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from contracap.config import require_count

Group = TypeVar("Group", bound=Hashable)
Item = TypeVar("Item")
Value = TypeVar("Value")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """Size of the batches, and how long a request waits for others."""

    max_batch: int = 16
    """Largest number of images or texts in a batch."""
    max_wait_ms: float = 5.0
    """Longest time in milliseconds that a request waits for others while the model is idle."""

    def __post_init__(self) -> None:
        require_count("max_batch", self.max_batch, 1, "images that go through the model together", most=4096)
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(f"max_wait_ms must be from 0 to 60000 milliseconds, not {self.max_wait_ms}")


class BatchError(RuntimeError):
    """The work on a batch failed; what went wrong is in the log."""


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class PriorityLock:
    """One batch at a time has the model. A heavy batch gives way to light ones, also between its own steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._light = 0  # batches that wait

    @contextmanager
    def hold(self, *, heavy: bool) -> Iterator[None]:
        """Give the model to one batch alone for the length of a context."""
        self._take(heavy)
        try:
            yield
        finally:
            self._leave()

    def give_way(self) -> None:
        """Let the light batches that wait go first; called by a heavy one."""
        if self._light:
            self._leave()
            self._take(True)

    def _take(self, heavy: bool) -> None:
        with self._changed:
            self._light += not heavy
            self._changed.wait_for(lambda: not self._taken and not (heavy and self._light))
            self._light -= not heavy
            self._taken = True

    def _leave(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()


@dataclass(eq=False)
class _Request:
    """One item that waits for its answer.

    Attributes:
        group: the work and what it is done with; only requests of one group share a batch.
        max_items: items that a batch of the group may have.
        deadline: time at which it is sent even if its batch is not full, on the event loop's clock in seconds.
    """

    group: tuple[Callable[..., list[Any]], Hashable]
    item: Any
    max_items: int
    deadline: float
    answer: asyncio.Future[Any]


class Batcher:
    """Groups requests and runs one batch at a time in a thread of its own, while the event loop continues.

    The oldest request decides which group is next. It goes when `max_batch` of its group are there, or when it has
    waited for `max_wait_ms`; all that arrive while a batch runs wait for its end anyway. A failure is that of its
    batch alone. Use it as `async with Batcher(...) as batcher`.

    Attributes:
        lock: shared with other batchers whose work uses the same model.
        heavy: whether its batches give way to those of the other batchers.
        observe: is told the size of each batch.
    """

    def __init__(
        self,
        config: BatchingConfig,
        *,
        lock: PriorityLock | None = None,
        heavy: bool = False,
        observe: Callable[[int], None] = lambda size: None,
    ):
        self.config, self.lock, self.heavy, self.observe = config, lock or PriorityLock(), heavy, observe
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
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(
        self,
        work: Callable[[Group, list[Item], Callable[[], None]], list[Value]],
        group: Group,
        item: Item,
        *,
        max_items: int | None = None,
    ) -> Value:
        """Return the result for `item` of a batch, `work(group, items, check_cancelled)`.

        A cancelled call leaves the queue. Work that takes long calls `check_cancelled()` between its steps, which
        raises AbandonedError if all its requests are cancelled.

        Args:
            max_items: items that may share the batch; at most `max_batch`.

        Raises: BatchError: if the work failed.
        """
        loop = asyncio.get_running_loop()
        max_items = min(max_items or self.config.max_batch, self.config.max_batch)
        deadline = loop.time() + self.config.max_wait_ms / 1000
        request = _Request((work, group), item, max_items, deadline, loop.create_future())
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
            self.observe(len(batch))
            try:
                answers = await loop.run_in_executor(self._thread, self._work, batch)
                done = list(zip(batch, answers, strict=True))
            except AbandonedError:
                pass
            except Exception:
                log.exception("a batch of %d requests failed", len(batch))
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(BatchError("the model failed on this request"))
            else:
                for request, answer in done:
                    if not request.answer.done():  # else its client has gone, or has waited for too long
                        request.answer.set_result(answer)

    def _work(self, batch: list[_Request]) -> list[Any]:
        """Run a batch, in the thread."""

        def check_cancelled() -> None:
            if all(request.answer.done() for request in batch):
                raise AbandonedError
            if self.heavy:
                self.lock.give_way()

        work, group = batch[0].group
        with self.lock.hold(heavy=self.heavy):
            check_cancelled()
            return work(group, [request.item for request in batch], check_cancelled)

    async def _next(self) -> list[_Request]:
        """Return the next batch, once it is full or its oldest request has waited long enough."""
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            oldest = next(iter(self._waiting))
            batch = [request for request in self._waiting if request.group == oldest.group][: oldest.max_items]
            left = oldest.deadline - asyncio.get_running_loop().time()
            if len(batch) == oldest.max_items or left <= 0:
                for request in batch:
                    del self._waiting[request]
                return batch
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()
