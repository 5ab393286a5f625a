"""Samples to embeddings, batch by batch, for all evaluators."""

from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from contracap.data.counts import indexed_samples
from contracap.data.loader import evaluation_samples
from contracap.data.questions import QuestionSamples
from contracap.data.samples import Sample
from contracap.data.shards import list_shards
from contracap.data.workers import prepare_ahead
from contracap.image_files import ImageError
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.progress import progress_bar

T = TypeVar("T")

Source = str | Path | Sequence[str | Path] | Iterable[Sample]
"""Data to evaluate on: shards or folders of them; a file of questions of VQAv2 or OK-VQA, which the folder of its
images may follow; or the samples themselves."""


@dataclass(frozen=True)
class ShardSamples:
    """The samples of shards, which are read again in each iteration.

    Attributes:
        lines: whether each line of a `.txt` is a caption; otherwise the whole file is one.
    """

    paths: Sequence[str | Path]
    lines: bool = True

    def __iter__(self) -> Iterator[Sample]:
        return evaluation_samples(self.paths, lines=self.lines)

    def count(self) -> int | None:
        """Return the number of samples if the index of the shards has it."""
        with suppress(OSError, ValueError):  # whoever reads the shards says what is wrong
            return indexed_samples(list_shards(self.paths))
        return None


def open_source(source: Source, *, lines: bool = True) -> Iterable[Sample]:
    """Return the samples of a source; a file of questions is read now.

    Args:
        lines: as in `ShardSamples`.

    Raises: FileNotFoundError, ValueError: if a file of questions cannot be used, or two folders follow it.
    """
    items = [source] if isinstance(source, str | Path) else source
    if not isinstance(items, Sequence) or not items or isinstance(items[0], Sample):
        return cast(Iterable[Sample], items)
    file, *folders = items
    if not str(file).endswith(".json"):
        return ShardSamples(items, lines)
    if len(folders) > 1:
        raise ValueError(f"after the questions {file} comes one folder, of images, not {len(folders)}")
    return QuestionSamples(file, images=folders[0] if folders else None)


def sample_batches(source: Source, size: int) -> Generator[list[Sample], None, None]:
    """Yield all samples once, in their order, `size` at a time.

    Raises: ValueError: if `size` is below 1 or there is no sample.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be at least 1 sample")
    samples = open_source(source)
    stream = iter(samples)
    batch = list(islice(stream, size))
    if not batch:
        where = f" in {', '.join(map(str, samples.paths))}" if isinstance(samples, ShardSamples) else ""
        raise ValueError(f"no samples to evaluate on{where}")
    while batch:
        yield batch
        batch = list(islice(stream, size))


@contextmanager
def pixel_batches(
    source: Source, processor: Processor, size: int
) -> Iterator[Iterator[tuple[list[Sample], Float32[Tensor, "batch 3 height width"]]]]:
    """A context with the batches of `sample_batches`, each with its pixels, which threads decode ahead of time.

    Raises: ValueError: as `sample_batches` and `image_pixels` do, when they reach the batch.
    """
    samples = open_source(source)
    with prepare_ahead(partial(image_pixels, processor=processor), sample_batches(samples, size)) as batches:
        yield with_progress(batches, samples)


def with_progress(batches: Iterable[tuple[list[Sample], T]], source: Source) -> Iterator[tuple[list[Sample], T]]:
    """Yield the batches, and show a progress bar that counts their images."""
    with progress(source) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def progress(source: Source) -> tqdm:
    """Return a progress bar of images; its total is known if the source or an index knows it."""
    samples = open_source(source)
    total = (
        samples.count() if isinstance(samples, ShardSamples) else len(samples) if isinstance(samples, Sized) else None
    )
    return progress_bar(total=total, desc="evaluate", unit=" images", leave=False)


def image_pixels(samples: Sequence[Sample], processor: Processor) -> Float32[Tensor, "batch 3 height width"]:
    """Return the normalised pixels of the samples.

    Raises: ImageError: if an image cannot be used; names its sample.
    """
    try:
        return processor.images([sample.image for sample in samples])
    except ImageError:
        for sample in samples:
            try:
                processor.images([sample.image])
            except ImageError as error:
                raise ImageError(f"sample {sample.key} of {sample.shard}: {error}") from error
        raise


def embed_images(model: CoCa, pixels: Float32[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch embed"]:
    """Return the embeddings of one batch of images: unit rows on the model's device."""
    return require_finite(model.encode_image(pixels.to(model.device)), "images")


def embed_texts(
    model: CoCa, processor: Processor, texts: Sequence[str], batch_size: int
) -> Float32[Tensor, "text embed"]:
    """Return the embeddings of texts, `batch_size` at a time: unit rows on the model's device."""
    chunks = (processor.texts(texts[first : first + batch_size]) for first in range(0, len(texts), batch_size))
    return require_finite(torch.cat([model.encode_text(ids.to(model.device)) for ids in chunks]), "texts")


def require_finite(features: Tensor, what: str) -> Float32[Tensor, "row embed"]:
    """Return the features in fp32.

    Raises: ValueError: if one is NaN or infinite: comparisons with NaN are false, which would count as perfect ranks.
    """
    features = features.float()
    if not features.sum(dim=1).isfinite().all():  # a sum takes less memory than a mask of all features
        raise ValueError(f"the model's features of {what} are not finite (NaN or infinite): its weights are broken")
    return features


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context in which matrix products are computed in fp32, without autocast or TF32. Half precision makes ties, and
    figures that change between runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
