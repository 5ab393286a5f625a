"""Pictures read and decoded in threads, ahead of the model that works on them.

Threads do: files, sockets, the JPEG decoder and the resizing release the interpreter's lock, pixels need not be copied
between processes, and nothing has to start.
"""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from contracap.bulk.inputs import Item
from contracap.image import ImageConfig, decode, resize_and_crop

PATIENCE = 2.0  # seconds that threads get to end in; one that waits for a silent server is left behind

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class PictureBatch:
    """Neighbours of the stream of items.

    Attributes:
        items: all of them, in order.
        broken: the places of those that cannot be used, and why.
        pixels: of the usable ones, resized and cropped, not yet normalised.
    """

    items: list[Item]
    broken: dict[int, Exception]
    pixels: UInt8[Tensor, "usable 3 height width"]

    @property
    def usable(self) -> list[Item]:
        """Those with pixels, in order."""
        return [item for place, item in enumerate(self.items) if place not in self.broken]


def read_pixels(item: Item, config: ImageConfig) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """The picture as the model sees it, before normalisation.

    Raises:
        OSError, ValueError: if it cannot be had, or is broken.
    """
    return resize_and_crop(decode(item.content(), name=item.name), config)


def picture_batches(
    items: Generator[Item, None, None], config: ImageConfig, *, batch_size: int, workers: int
) -> Generator[PictureBatch, None, None]:
    """Batches of `batch_size` usable pictures, the last perhaps smaller, in the order of the items.

    `workers` threads read ahead by two batches, and so many broken pictures end a batch, too: memory does not depend on
    how many items there are.
    """
    found, rows, broken = list[Item](), list[Tensor](), dict[int, Exception]()

    def batch() -> PictureBatch:
        size = config.size
        pixels = torch.stack(rows) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return PictureBatch(items=found, broken=broken, pixels=pixels)

    read = in_threads(lambda item: read_pixels(item, config), items, workers=workers, ahead=2 * batch_size)
    with closing(read):
        for item, future in read:
            try:
                rows.append(future.result())
            except (OSError, ValueError) as error:
                broken[len(found)] = error
            found.append(item)
            if batch_size in (len(rows), len(broken)):
                yield batch()
                found, rows, broken = [], [], {}
    if found:
        yield batch()


def in_threads(
    function: Callable[[Item], Result], items: Generator[Item, None, None], *, workers: int, ahead: int
) -> Generator[tuple[Item, "Future[Result]"], None, None]:
    """What `function` makes of each item, in their order; the items, too, are taken in a thread of their own.

    At most `ahead` items are taken that the caller has not got yet. An error of `items` is raised in its place.
    """
    ordered = SimpleQueue[tuple[Item, Future[Result]] | BaseException | None]()
    tasks = SimpleQueue[tuple[Item, Future[Result]] | None]()
    room, stopped = threading.Semaphore(ahead), threading.Event()

    def feed() -> None:  # closes the items where it read them: a shell command that gives a shard must not go on
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
