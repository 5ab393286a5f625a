"""Captions for many images: read ahead, captioned in batches, written as they come."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from jaxtyping import UInt8
from torch import Tensor

from contracap.apps.bulk.image_batches import image_batches
from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.outputs import Output, is_of_one_image
from contracap.apps.bulk.rows import Row
from contracap.images import ImageConfig
from contracap.progress import progress_bar, show_waiting
from contracap.wording import counted

Describe = Callable[[Sequence[str], UInt8[Tensor, "batch 3 height width"]], list[Row]]
"""Names and pixels of a batch to a row for each; `caption_rows` with its other arguments filled in."""


@dataclass(kw_only=True)
class Outcome:
    """Counts of images by what became of them.

    Attributes:
        captioned: captions that were made.
        added: those of them that the output did not have.
        skipped: images that already had a caption.
        repeated: images that came before in the same run; they are among the skipped, or captioned but not added.
        broken: the error of each image that could not be captioned.
        seconds: wall time.
    """

    captioned: int = 0
    added: int = 0
    skipped: int = 0
    repeated: int = 0
    broken: list[Exception] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seen(self) -> int:
        """Images so far."""
        return self.captioned + self.skipped + len(self.broken)

    def summary(self) -> str:
        """Return what was done, in one line."""
        before = self.captioned - self.added + self.skipped - self.repeated
        rate = f" in {self.seconds:.1f} s, {self.captioned / self.seconds:.1f} images/s" if self.captioned else ""
        numbers = {"had one before": before, "repeated in the list": self.repeated, "cannot be used": len(self.broken)}
        others = "".join(f", {number:,} {what}" for what, number in numbers.items() if number)
        return f"{counted(self.added, 'caption(s)')}{rate}{others}"


def caption_images(
    items: Generator[Item, None, None],
    describe: Describe,
    output: Output,
    *,
    image: ImageConfig,
    batch_size: int,
    workers: int,
    seen: Callable[[Row], object] = lambda row: None,
    progress: bool = True,
    total: Callable[[], int | None] = lambda: None,
) -> Outcome:
    """Describe all images and write what is said of them; a few batches are in memory at a time.

    Args:
        items: taken once, as they are needed.
        image: how the model wants its images.
        workers: threads that read and decode.
        seen: gets each row as well.
        progress: whether a bar is shown on a terminal.
        total: counts the items for the bar, in a thread of its own.

    Raises:
        KeyboardInterrupt: that says what is done, if the user ends it.
        OSError: if the output cannot be written; what was written before is kept.
        ValueError: if the model cannot describe a batch.
    """
    begun, outcome = time.monotonic(), Outcome()
    written: Future[list[Exception]] | None = None  # while the next batch is described: discs make one wait

    def take(errors: list[Exception]) -> None:
        outcome.broken += errors
        outcome.captioned -= len(errors)
        outcome.added = output.added

    bar = progress_bar(total=total, unit=" images", disable=not progress)
    missing = _missing(items, output, outcome)
    batches = image_batches(missing, image, batch_size=batch_size, workers=workers, on_wait=show_waiting(bar))
    with _report_interruption(outcome, output), closing(batches), bar, ThreadPoolExecutor(1) as writer:
        for batch in batches:
            outcome.broken += batch.broken.values()
            if not (usable := batch.usable):
                bar.update(outcome.seen - bar.n)
                continue
            rows = describe([item.name for item in usable], batch.pixels)
            if written is not None:
                take(written.result())
            written = writer.submit(output.write, list(zip(usable, rows, strict=True)))
            for row in rows:
                seen(row)
            outcome.captioned += len(rows)
            bar.update(outcome.seen - bar.n)
        if written is not None:
            take(written.result())
        bar.update(outcome.seen - bar.n)
        output.finish()
    outcome.seconds, outcome.repeated = time.monotonic() - begun, output.repeated
    return outcome


@contextmanager
def _report_interruption(outcome: Outcome, output: Output) -> Iterator[None]:
    """Say in an interruption what is done, and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"{counted(outcome.captioned, 'caption(s)')}, {outcome.skipped:,} were there before"
        raise KeyboardInterrupt(f"interrupted after {done}; {output.resumption}") from None


def _missing(items: Generator[Item, None, None], output: Output, outcome: Outcome) -> Generator[Item, None, None]:
    """Yield the items that the output lacks; one it has no place for becomes one that says so."""
    with closing(items):
        for item in items:
            if not isinstance(item.source, Exception):
                try:
                    if output.has(item):
                        outcome.skipped += 1
                        continue
                except (OSError, ValueError) as error:
                    if not is_of_one_image(error):
                        raise
                    item = replace(item, source=error)
            yield item


def take_first(items: Generator[Item, None, None], limit: int | None) -> Generator[Item, None, None]:
    """Yield the first `limit` of some items; None: all."""
    with closing(items):
        yield from islice(items, limit)
