"""Contrastive embeddings of many images: read ahead, embedded in batches, written to one file."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from contracap.apps.bulk.image_batches import image_batches
from contracap.apps.bulk.inputs import Item
from contracap.evaluation.features import require_finite
from contracap.extras import require_extra
from contracap.files import replace_file
from contracap.images import normalise
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

EmbeddingFormat = Literal["npz", "parquet"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Neighbours of the stream of items.

    Attributes:
        names: of the images that could be used, in order.
        embeddings: theirs, unit rows, on the model's device.
        broken: why each of the others has none.
    """

    names: list[str]
    embeddings: Float32[Tensor, "image embed"]
    broken: list[Exception]


def embed_items(
    model: CoCa,
    processor: Processor,
    items: Generator[Item, None, None],
    *,
    batch_size: int,
    workers: int,
    on_wait: Callable[[int, str], object] = lambda done, what: None,
) -> Iterator[EmbeddingBatch]:
    """Embeddings of all images, in order; memory does not depend on how many there are.

    Args:
        workers: threads that read and decode.
        on_wait: as in `image_batches`.

    Raises: ValueError: if the model gives numbers that are not finite.
    """
    batches = image_batches(items, processor.image_config, batch_size=batch_size, workers=workers, on_wait=on_wait)
    with closing(batches), evaluating(model):
        for batch in batches:
            with torch.inference_mode():
                pixels = normalise(batch.pixels.to(model.device), processor.image_config)
                embeddings = require_finite(model.encode_image(pixels), "images")
            names = [item.name for item in batch.usable]
            yield EmbeddingBatch(names=names, embeddings=embeddings, broken=list(batch.broken.values()))


def write_embeddings(path: Path, kind: EmbeddingFormat, batches: Iterator[EmbeddingBatch]) -> int:
    """Write a row for each image, the file whole or not at all; return the number of rows.

    `npz`: NumPy arrays `paths` and `embeddings`, which are in memory until the end. `parquet`: columns `path` and
    `embedding`, written as they come.

    Raises: ImportError: if pyarrow is missing. OSError: if the file cannot be written.
    """
    with replace_file(path) as partial:
        if kind == "parquet":
            return _write_parquet(partial, batches)
        paths, rows = list[str](), list[np.ndarray]()
        for batch in batches:
            paths += batch.names
            rows.append(batch.embeddings.cpu().numpy())
        with partial.open("wb") as file:
            embeddings = np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.float32)
            np.savez(file, paths=np.array(paths, dtype=np.str_), embeddings=embeddings)
        return len(paths)


def _write_parquet(partial: Path, batches: Iterator[EmbeddingBatch]) -> int:
    require_extra("data", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("path", pyarrow.string()), ("embedding", pyarrow.list_(pyarrow.float32()))])
    count = 0
    with ParquetWriter(partial, schema) as writer:
        for batch in batches:
            rows = list(batch.embeddings.cpu().numpy())
            writer.write_table(pyarrow.table({"path": batch.names, "embedding": rows}, schema=schema))
            count += len(rows)
    return count
