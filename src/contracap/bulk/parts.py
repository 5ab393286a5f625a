"""One shard in, one parquet file out: the unit of work of a run over many shards."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Float32, UInt8
from pyarrow.parquet import ParquetWriter
from torch import Tensor

from contracap import __version__
from contracap.bulk.folder import Folder
from contracap.bulk.rows import picture_number
from contracap.config import to_dict
from contracap.data.remote import WEB
from contracap.data.shards import SAMPLE_SUFFIXES, Record, SampleError, ShardError, parse, records
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.image import ImageError, decode, normalise, resize_and_crop
from contracap.model.coca import CoCa
from contracap.processor import Processor

Precision = Literal["float32", "float16"]

METADATA_KEY = "contracap"  # of the parquet schema, as of our weights files
ROWS = 4096  # of a row group, at least, but for a shard's last


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """What a run makes of every shard.

    Attributes:
        strategy: how captions are written; None: there are none.
        prompt: how each caption begins.
        embedding: how embeddings are stored; None: there are none.
        batch_size: pictures at a time; it decides speed and memory.
    """

    strategy: Strategy | None = None
    prompt: str = ""
    embedding: Precision | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1 picture")
        if self.strategy is None and self.embedding is None:
            raise ValueError("nothing to do: neither captions nor embeddings are wanted")
        if self.strategy is None and self.prompt:
            raise ValueError("a prompt is how captions begin, and no captions are wanted")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one shard: rows of its part, and those of them without a result because the picture cannot be
    read; or why there is no part."""

    shard: str
    rows: int = 0
    unreadable: int = 0
    problem: str = ""


def located(name: str) -> str:
    """A name of a shard or folder that means the same to every process: of local ones the whole path."""
    return name if "://" in name or name.startswith("pipe:") else os.path.abspath(name)


def part_name(shard: str) -> str:
    """The name of a shard's part: that of its file, and a digest of all that stands before it, since shards of several
    folders are often called the same.

    It depends on nothing else, so that runs over any list of shards agree on what is done.
    """
    name = located(shard)
    if name.startswith(WEB):
        name = re.split(r"[?#]", name, maxsplit=1)[0]  # a signature is another one tomorrow
    stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name.rpartition("/")[2])
    readable = re.sub(r"[^\w.-]+", "_", stem)[:100].lstrip(".")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.parquet"


def settings(config: BulkConfig, model: CoCa, processor: Processor) -> dict[str, Any]:
    """What decides the content of a part besides its shard, ready for JSON."""
    strategy = config.strategy and {"name": type(config.strategy).__name__, **to_dict(config.strategy)}
    chosen = {"strategy": strategy, "prompt": config.prompt, "embedding": config.embedding}
    return {"weights_sha256": _digest(model, processor), **chosen}


def description(weights: str, model: CoCa, processor: Processor) -> dict[str, Any]:
    """Where the settings come from, for readers of a part or a manifest, ready for JSON."""
    return {
        "contracap": __version__,
        "weights": weights,
        "model": to_dict(model.config),
        "image": to_dict(processor.image_config),
    }


def _digest(model: CoCa, processor: Processor) -> str:
    """Of the configuration and every tensor."""
    digest = hashlib.sha256(json.dumps([to_dict(model.config), to_dict(processor.image_config)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Picture:
    """A sample's picture as the model is fed it, before it is normalised; or why it cannot be read."""

    key: str
    pixels: UInt8[Tensor, "3 size size"] | None
    error: str | None


class PartWriter:
    """Writes the parts of a run, one after the other.

    Raises: ValueError: if captions are wanted of a model without a text decoder, or as this one cannot write them.
    """

    def __init__(
        self, config: BulkConfig, model: CoCa, processor: Processor, *, metadata: dict[str, Any], threads: int
    ) -> None:
        """`metadata`: for the schema, ready for JSON. `threads`: those that decode pictures beside the model's."""
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

    def write(self, shard: str, folder: Folder) -> Outcome:
        """Writes the part of one shard, whole or not at all; a row for each sample, in their order.

        A picture that cannot be read has a row with `error` and nothing else. Of a shard that cannot be read to its
        end there is no part: the outcome says why. What is in memory does not grow with the shard.

        Raises:
            OSError: if the part cannot be written.
            ValueError: if the model gives numbers that are not finite.
        """
        rows = unreadable = 0
        try:
            with folder.writing(part_name(shard)) as path, ParquetWriter(path, self._schema) as writer:
                waiting: list[pa.RecordBatch] = []
                for pictures in self._batches(shard):
                    waiting.append(self._rows(shard, pictures))
                    rows += len(pictures)
                    unreadable += sum(picture.pixels is None for picture in pictures)
                    if sum(map(len, waiting)) >= ROWS:
                        writer.write_table(pa.Table.from_batches(waiting))
                        waiting = []
                writer.write_table(pa.Table.from_batches(waiting, self._schema))
        except ShardError as error:
            return Outcome(shard=shard, problem=str(error))
        return Outcome(shard=shard, rows=rows, unreadable=unreadable)

    def _batches(self, shard: str) -> Iterator[list[_Picture]]:
        """The pictures of a shard; the next batch is read and decoded while the model works on one."""
        found = records(shard, suffixes=SAMPLE_SUFFIXES)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self._threads) as decoders:

            def batch() -> list[_Picture]:
                return list(decoders.map(self._decoded, islice(found, self._config.batch_size)))

            ahead = reader.submit(batch)
            while pictures := ahead.result():
                ahead = reader.submit(batch)
                yield pictures

    def _decoded(self, record: Record) -> _Picture:
        try:
            picture = decode(parse(record).image, name=f"sample {record.key} of {record.shard}")
        except (SampleError, ImageError) as error:
            return _Picture(record.key, None, str(error))
        return _Picture(record.key, resize_and_crop(picture, self._processor.image_config), None)

    def _rows(self, shard: str, pictures: list[_Picture]) -> pa.RecordBatch:
        columns: dict[str, list[Any]] = {name: [None] * len(pictures) for name in self._schema.names}
        columns["key"] = [picture.key for picture in pictures]
        columns["shard"] = [shard] * len(pictures)
        columns["error"] = [picture.error for picture in pictures]
        readable = {row: picture.pixels for row, picture in enumerate(pictures) if picture.pixels is not None}
        if readable:
            pixels = torch.stack(list(readable.values())).to(self._model.device)
            numbers = [picture_number(f"{shard}/{columns['key'][row]}") for row in readable]
            for name, values in self._results(normalise(pixels, self._processor.image_config), numbers).items():
                for row, value in zip(readable, values, strict=True):
                    columns[name][row] = value
        return pa.RecordBatch.from_arrays(
            [pa.array(columns[field.name], field.type) for field in self._schema], schema=self._schema
        )

    def _results(self, pixels: Float32[Tensor, "batch 3 height width"], numbers: list[int]) -> dict[str, list[Any]]:
        """The columns that the model fills. `numbers`: of the pictures, for what is sampled."""
        config = self._config
        if self._captioner is None or config.strategy is None:
            with torch.inference_mode():
                embeddings = self._model.encode_image(pixels).float().cpu()
            results = {}
        else:
            made = self._captioner.generate(pixels, config.strategy, config.prompt, numbers)
            embeddings = torch.stack([caption.embedding for caption in made])
            fields = (("caption", "text"), ("score", "score"), ("log_probability", "log_probability"))
            results = {name: [getattr(caption, field) for caption in made] for name, field in fields}
        if config.embedding is not None:
            if not embeddings.isfinite().all():
                raise ValueError("the model's embeddings are not finite (NaN or infinite): its weights are broken")
            results["embedding"] = list(embeddings.numpy().astype(config.embedding))
        return results
