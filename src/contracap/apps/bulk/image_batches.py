"""Images read and decoded in threads, ahead of the model that works on them."""

from collections.abc import Callable, Generator
from concurrent.futures import wait
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from contracap.apps.bulk.inputs import Item
from contracap.data.workers import in_threads
from contracap.download import LONGEST
from contracap.image_files import decode
from contracap.images import ImageConfig, resize_and_crop


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
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
        """Items with pixels, in order."""
        return [item for place, item in enumerate(self.items) if place not in self.broken]


def read_pixels(item: Item, config: ImageConfig) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """The image as the model sees it, before normalisation.

    Raises:
        OSError, ValueError: if it cannot be had, or is broken.
    """
    return resize_and_crop(decode(item.content(), name=item.name), config)


def image_batches(
    items: Generator[Item, None, None],
    config: ImageConfig,
    *,
    batch_size: int,
    workers: int,
    on_wait: Callable[[int, str], object] = lambda done, what: None,
) -> Generator[ImageBatch, None, None]:
    """Yield batches of `batch_size` usable images in the order of the items; the last may be smaller.

    `batch_size` broken images end a batch too, so that memory does not depend on the number of items.

    Args:
        workers: threads, which read two batches ahead.
        on_wait: called each second with the number of finished images and the name of the image that is waited for;
            with an empty name when it arrives.
    """
    found, rows, broken = list[Item](), list[Tensor](), dict[int, Exception]()
    done = 0

    def batch() -> ImageBatch:
        size = config.size
        pixels = torch.stack(rows) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return ImageBatch(items=found, broken=broken, pixels=pixels)

    read = in_threads(lambda item: read_pixels(item, config), items, workers=workers, ahead=2 * batch_size)
    with closing(read):
        for item, future in read:
            late = False
            while not wait([future], timeout=1).done:
                late = True
                limit = f" (a URL is given up after {LONGEST:.0f} s)" if isinstance(item.source, str) else ""
                on_wait(done, f"{item.name}{limit}")
            if late:
                on_wait(done, "")
            done += 1
            try:
                rows.append(future.result())
            except (OSError, ValueError) as error:
                broken[len(found)] = error
            except Exception as error:  # of any library that decodes: one image must not end the run
                broken[len(found)] = ValueError(f"{item.name} cannot be read: {type(error).__name__}: {error}")
            found.append(item)
            if batch_size in (len(rows), len(broken)):
                yield batch()
                found, rows, broken = [], [], {}
    if found:
        yield batch()
