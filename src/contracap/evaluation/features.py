"""Samples, images and texts into features, batch by batch: what the evaluators have in common."""

from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from contracap.data.counts import indexed_samples
from contracap.data.folders import ClassFolders
from contracap.data.loader import evaluation_samples
from contracap.data.questions import QuestionSamples
from contracap.data.samples import Sample
from contracap.data.shards import list_shards
from contracap.data.workers import prepared
from contracap.images import ImageError
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.progress import progress_bar

T = TypeVar("T")


@dataclass(frozen=True)
class WholeTexts:
    """Shards in which a `.txt` is one caption, whatever its lines."""

    paths: Sequence[str | Path]

    def __iter__(self) -> Iterator[Sample]:
        return evaluation_samples(self.paths, lines=False)


# Shards or folders of them, a file of questions of VQAv2 or OK-VQA and the folder of its images, or samples at hand.
Source = str | Path | Sequence[str | Path] | Sequence[Sample] | QuestionSamples | ClassFolders | WholeTexts
READY = QuestionSamples | ClassFolders | WholeTexts


def opened(source: Source, *, lines: bool = True) -> Source:
    """The source; of a file of questions its samples, so that who goes through them again need not read it again.

    Args:
        lines: of shards, each line of a `.txt` is a caption; else the whole is one.

    Raises: FileNotFoundError, ValueError: at such a file, as `QuestionSamples` does, or if two folders come after it.
    """
    if isinstance(source, READY):
        return source
    items = [source] if isinstance(source, str | Path) else source
    paths = [item for item in items if not isinstance(item, Sample)]
    if not paths or not str(paths[0]).endswith(".json"):
        return source if lines or not paths else WholeTexts(paths)
    file, *folders = paths
    if len(folders) > 1:
        raise ValueError(f"after the questions {file} comes one folder, of images, not {len(folders)}")
    return QuestionSamples(file, images=folders[0] if folders else None)


def sample_batches(source: Source, size: int) -> Generator[list[Sample], None, None]:
    """All samples once, in their order, `size` at a time.

    Raises:
        ValueError: if `size` is below 1 or there is no sample.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be at least 1 sample")
    stream = iter(_samples(source))
    batch = list(islice(stream, size))
    if not batch:
        raise ValueError(f"no samples to evaluate on{f' in {source}' if isinstance(source, str | Path) else ''}")
    while batch:
        yield batch
        batch = list(islice(stream, size))


@contextmanager
def picture_batches(
    source: Source, processor: Processor, size: int
) -> Iterator[Iterator[tuple[list[Sample], Float32[Tensor, "batch 3 height width"]]]]:
    """Within the block: the batches of `sample_batches`, each with its images as the model is fed them, which threads
    decode ahead.

    Raises: ValueError: as `sample_batches` and `picture_pixels` do, where they would.
    """
    with prepared(partial(picture_pixels, processor=processor), sample_batches(source, size)) as batches:
        yield with_progress(batches, source)


def with_progress(batches: Iterable[tuple[list[Sample], T]], source: Source) -> Iterator[tuple[list[Sample], T]]:
    """The batches, and on a terminal a bar that counts their images."""
    with progress(source) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def progress(source: Source) -> tqdm:
    """A bar that counts images on a terminal; it knows how many there are where the source or an index tells."""
    total = len(source) if isinstance(source, Sized) and not isinstance(source, str) else None
    if isinstance(source, str | Path) or (isinstance(source, Sequence) and not isinstance(source[0], Sample)):
        with suppress(OSError, ValueError):  # who reads it will say what is wrong
            total = indexed_samples(list_shards(source))
    return progress_bar(total=total, desc="evaluate", unit=" images", leave=False)


def picture_pixels(samples: Sequence[Sample], processor: Processor) -> Float32[Tensor, "batch 3 height width"]:
    """The samples' images as the model is fed them.

    Raises:
        ImageError: if an image cannot be used; names its sample.
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


def embed_pictures(model: CoCa, pixels: Float32[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch embed"]:
    """Embeddings of one batch of images, unit rows, where the model is."""
    return finite(model.encode_image(pixels.to(next(model.parameters()))), "images")


def embed_texts(
    model: CoCa, processor: Processor, texts: Sequence[str], batch_size: int
) -> Float32[Tensor, "text embed"]:
    """Embeddings of texts, `batch_size` at a time, unit rows, where the model is."""
    device = next(model.parameters()).device
    chunks = (processor.texts(texts[first : first + batch_size]) for first in range(0, len(texts), batch_size))
    return finite(torch.cat([model.encode_text(ids.to(device)) for ids in chunks]), "texts")


def finite(features: Tensor, what: str) -> Float32[Tensor, "row embed"]:
    """The features in fp32.

    Raises:
        ValueError: if one is NaN or infinite: comparisons with NaN are false, which would count as perfect ranks.
    """
    features = features.float()
    if not features.sum(dim=1).isfinite().all():  # so many numbers, rather than as many as there are features
        raise ValueError(f"the model's features of {what} are not finite (NaN or infinite): its weights are broken")
    return features


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in fp32: no autocast, no TF32. Half precision makes ties, and figures that move between runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _samples(source: Source) -> Iterable[Sample]:
    source = opened(source)
    if isinstance(source, READY):
        return source
    items = [source] if isinstance(source, str | Path) else source
    if at_hand := [item for item in items if isinstance(item, Sample)]:
        return at_hand
    return evaluation_samples([item for item in items if not isinstance(item, Sample)])
