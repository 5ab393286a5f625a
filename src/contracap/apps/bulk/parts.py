"""One shard in, one parquet file out: the unit of work of a run over many shards."""

import hashlib
import json
import os
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from pyarrow.parquet import ParquetWriter
from torch import Tensor

from contracap.apps.bulk.image_batches import ImageBatch, image_batches
from contracap.apps.bulk.inputs import OTHER_IMAGE, Item, images_of
from contracap.apps.bulk.output_config import caption_config
from contracap.apps.bulk.output_folder import Folder
from contracap.apps.bulk.rows import caption_rows
from contracap.apps.bulk.table_files import ROW_GROUP
from contracap.config import require_count
from contracap.data.image_finder import SkippedFiles
from contracap.data.remote import WEB
from contracap.data.shards import ShardError
from contracap.files import path_text
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.images import normalise
from contracap.model.coca import CoCa
from contracap.precision import EmbeddingDType, Precision
from contracap.processor import Processor

NAMED = 3  # images that cannot be read, for each shard
METADATA_KEY = "contracap"  # of the parquet schema, as of our weights files


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """Captions and embeddings that a run makes of every shard.

    Attributes:
        strategy: how captions are written; None: there are none.
        prompt: how each caption begins.
        embedding: how embeddings are stored; None: there are none.
        precision: in which the models compute, as in `contracap.load`.
        batch_size: images at a time; it decides speed and memory.
    """

    strategy: Strategy | None = None
    prompt: str = ""
    embedding: EmbeddingDType | None = None
    precision: Precision = "auto"
    batch_size: int = 64

    def __post_init__(self) -> None:
        require_count("batch_size", self.batch_size, 1, "images at a time", most=2**16)
        if self.strategy is None and self.embedding is None:
            raise ValueError("nothing to do: neither captions nor embeddings are wanted")
        if self.strategy is None and self.prompt:
            raise ValueError("a prompt is how captions begin, and no captions are wanted")


@dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """Result for one shard.

    Attributes:
        rows: rows of its part.
        unreadable: those of them whose image cannot be read.
        first_unreadable: keys of the first of these.
        without_image: samples without an image, which have no row.
        other_images: further images of samples, of which the first is taken.
        problem: the reason if there is no part.
    """

    shard: str
    rows: int = 0
    unreadable: int = 0
    first_unreadable: str = ""
    without_image: int = 0
    other_images: int = 0
    problem: str = ""


def absolute_name(name: str) -> str:
    """A name of a shard or folder that means the same to every process: of local ones the whole path."""
    return name if "://" in name or name.startswith("pipe:") else os.path.abspath(name)


def part_name(shard: str) -> str:
    """The name of a shard's part: that of its file, and a digest of all that stands before it, since shards of several
    folders are often called the same.

    It depends on nothing else, so that runs over any list of shards agree on what is done.
    """
    name = absolute_name(shard)
    if name.startswith(WEB):
        name = re.split(r"[?#]", name, maxsplit=1)[0]  # a signature is another one tomorrow
    stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name.rpartition("/")[2])
    readable = re.sub(r"[^\w.-]+", "_", stem)[:100].lstrip(".")
    return f"{readable}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}.parquet"


def part_config(config: BulkConfig, model: CoCa, processor: Processor) -> dict[str, Any]:
    """Return all that the content of a part depends on, apart from its shard, ready for JSON."""
    chosen = caption_config(config.strategy, config.prompt, model, processor)
    return {**chosen, "precision": config.precision, "embedding": config.embedding}


class PartWriter:
    """Writes the parts of a run, one after the other.

    Raises: ValueError: if captions are wanted of a model without a text decoder, or as this one cannot write them.
    """

    def __init__(
        self, config: BulkConfig, model: CoCa, processor: Processor, *, metadata: dict[str, Any], threads: int
    ) -> None:
        """`metadata`: for the schema, ready for JSON. `threads`: number that decode images."""
        self._config, self._model, self._processor, self._threads = config, model, processor, threads
        self._captioner = Captioner(model, processor) if config.strategy is not None else None
        if self._captioner is not None and config.strategy is not None:
            self._captioner.check(config.strategy, config.prompt)
        fields = [pa.field("key", pa.string(), nullable=False), pa.field("shard", pa.string(), nullable=False)]
        if config.strategy is not None:
            numbers = [pa.field("score", pa.float32()), pa.field("log_probability", pa.float32())]
            fields += [pa.field("caption", pa.string()), *numbers]
        if config.embedding is not None:
            number = pa.float32() if config.embedding == "float32" else pa.float16()
            fields += [pa.field("embedding", pa.list_(number, model.config.embed_dim))]
        fields += [pa.field("error", pa.string())]
        self._schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata)})

    def write(self, shard: str, folder: Folder) -> ShardOutcome:
        """Write the part of one shard, whole or not at all: a row for each image, in order.

        An image that cannot be read has a row with `error` and nothing else. Of a shard that cannot be read to its
        end there is no part: the outcome says why. What is in memory does not grow with the shard.

        Raises:
            OSError: if the part cannot be written.
            ValueError: if the model gives numbers that are not finite.
        """
        rows, unreadable = 0, list[str]()
        passed = SkippedFiles()
        try:
            with (
                folder.writing(part_name(shard)) as path,
                ParquetWriter(path, self._schema) as writer,
                closing(self._batches(shard, passed)) as batches,
            ):
                waiting: list[pa.RecordBatch] = []
                for batch in batches:
                    waiting.append(self._rows(shard, batch))
                    rows += len(batch.items)
                    unreadable += [self._key(shard, batch.items[place]) for place in batch.broken]
                    if sum(map(len, waiting)) >= ROW_GROUP:
                        writer.write_table(pa.Table.from_batches(waiting))
                        waiting = []
                writer.write_table(pa.Table.from_batches(waiting, self._schema))
        except ShardError as error:
            return ShardOutcome(shard=shard, problem=str(error))
        other_images = passed.counts[OTHER_IMAGE]
        return ShardOutcome(
            shard=shard,
            rows=rows,
            unreadable=len(unreadable),
            first_unreadable=", ".join(unreadable[:NAMED]),
            without_image=passed.counts.total() - other_images,
            other_images=other_images,
        )

    @staticmethod
    def _key(shard: str, item: Item) -> str:
        return item.name.removeprefix(f"{path_text(shard)}/")

    def _batches(self, shard: str, passed: SkippedFiles) -> Generator[ImageBatch, None, None]:
        image, batch_size = self._processor.image_config, self._config.batch_size
        return image_batches(images_of(shard, passed), image, batch_size=batch_size, workers=self._threads)

    def _rows(self, shard: str, batch: ImageBatch) -> pa.RecordBatch:
        columns: dict[str, list[Any]] = {name: [None] * len(batch.items) for name in self._schema.names}
        columns["key"] = [self._key(shard, item) for item in batch.items]
        columns["shard"] = [path_text(shard)] * len(batch.items)
        for place, error in batch.broken.items():
            columns["error"][place] = str(error).encode(errors="backslashreplace").decode()
        places = [place for place in range(len(batch.items)) if place not in batch.broken]
        if places:
            for name, values in self._results([item.name for item in batch.usable], batch.pixels).items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        return pa.RecordBatch.from_arrays(
            [pa.array(columns[field.name], field.type) for field in self._schema], schema=self._schema
        )

    def _results(self, names: list[str], pixels: UInt8[Tensor, "batch 3 height width"]) -> dict[str, list[Any]]:
        """The columns that the model fills."""
        config, results = self._config, dict[str, list[Any]]()
        if self._captioner is None or config.strategy is None:
            with torch.inference_mode():
                normalised = normalise(pixels.to(self._model.device), self._processor.image_config)
                vectors: list[Any] = list(self._model.encode_image(normalised).float().cpu().numpy())
        else:
            embed_too = config.embedding is not None
            made = caption_rows(self._captioner, names, pixels, config.strategy, prompt=config.prompt, embed=embed_too)
            results = {name: [getattr(row, name) for row in made] for name in ("caption", "score", "log_probability")}
            vectors = [row.embedding for row in made]
        if config.embedding is not None:
            embeddings = np.stack(vectors)
            if not np.isfinite(embeddings).all():
                raise ValueError("the model's embeddings are not finite (NaN or infinite): its weights are broken")
            results["embedding"] = list(embeddings.astype(config.embedding))
        return results
