"""Captions for many pictures: read ahead, captioned in batches, written as they come."""

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from contracap.bulk.inputs import Item
from contracap.bulk.outputs import Output
from contracap.bulk.pictures import picture_batches
from contracap.bulk.rows import Row
from contracap.image import ImageConfig

Describe = Callable[[Sequence[str], UInt8[Tensor, "batch 3 height width"]], list[Row]]
"""Names and pixels of a batch to a row for each; `caption_rows` with its other arguments filled in."""


@dataclass(kw_only=True)
class Outcome:
    """What became of the pictures.

    Attributes:
        captioned: new captions.
        skipped: pictures that had one.
        broken: why each of the others has none.
        seconds: that it took.
    """

    captioned: int = 0
    skipped: int = 0
    broken: list[Exception] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """In one line."""
        skipped = f", {self.skipped} had one before" if self.skipped else ""
        broken = f", {len(self.broken)} cannot be used" if self.broken else ""
        rate = self.captioned / self.seconds if self.seconds else 0.0
        return f"{self.captioned} captions in {self.seconds:.1f} s, {rate:.1f} pictures/s{skipped}{broken}"


def caption_pictures(
    items: Generator[Item, None, None],
    describe: Describe,
    output: Output,
    *,
    image: ImageConfig,
    batch_size: int,
    workers: int,
    seen: Callable[[Row], object] = lambda row: None,
    progress: bool | None = None,
) -> Outcome:
    """Describe all pictures and write what is said of them; memory does not depend on how many there are.

    Args:
        items: taken once, as they are needed.
        image: how the model wants its pictures.
        workers: threads that read and decode.
        seen: gets each row as well.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        OSError: if the output cannot be written; what was written before is kept.
        ValueError: if the model cannot describe a batch.
    """
    begun, outcome = time.monotonic(), Outcome()
    batches = picture_batches(_missing(items, output, outcome), image, batch_size=batch_size, workers=workers)
    written: Future[None] | None = None  # a batch is written while the next one is described: discs make one wait
    bar = tqdm(unit=" pictures", disable=None if progress is None else not progress)
    with closing(batches), bar, ThreadPoolExecutor(1) as writer:
        for batch in batches:
            outcome.broken += batch.broken.values()
            if not (usable := batch.usable):
                continue
            rows = describe([item.name for item in usable], batch.pixels)
            if written is not None:
                written.result()
            written = writer.submit(output.write, list(zip(usable, rows, strict=True)))
            for row in rows:
                seen(row)
            outcome.captioned += len(rows)
            bar.update(len(rows))
        if written is not None:
            written.result()
        output.finish()
    outcome.seconds = time.monotonic() - begun
    return outcome


def _missing(items: Generator[Item, None, None], output: Output, outcome: Outcome) -> Generator[Item, None, None]:
    """The items that the output lacks; one it has no place for becomes one that says so."""
    with closing(items):
        for item in items:
            if not isinstance(item.source, Exception):
                try:
                    if output.has(item):
                        outcome.skipped += 1
                        continue
                except ValueError as error:
                    item = replace(item, source=error)
            yield item
