"""Make batches: draw samples, decode and crop their images, and tokenize their captions."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from contracap.data.batch import Batch
from contracap.data.config import DataConfig
from contracap.data.order import Order, OrderError, SampleStream, SkippedSample
from contracap.data.samples import Sample
from contracap.image_files import decode, require_trainable_size
from contracap.images import ImageConfig, augment
from contracap.tokenizer import Tokenizer, text_lengths

PreparedRow = tuple[UInt8[Tensor, "3 size size"], str, str]  # pixels, caption, key


@dataclass(frozen=True)
class WorkerBatch:
    """A worker's rows of a batch, or the error that ends it, and the positions of its streams after it."""

    batch: Batch | OrderError
    states: dict[int, dict[str, Any]]
    skipped: list[SkippedSample]


class BatchMaker:
    """A worker owns an equal share of the streams, and makes their rows of every batch."""

    def __init__(self, config: DataConfig, order: Order, *, image: ImageConfig, tokenizer: Tokenizer) -> None:
        self._config, self.order, self._image, self._tokenizer = config, order, image, tokenizer
        self._states: dict[int, dict[str, Any]] = {}

    def start(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Set the positions from which the next iteration continues."""
        self._states = dict(states)

    def make(self, worker: int, workers: int) -> Iterator[WorkerBatch]:
        """Yield the rows of a worker, batch by batch."""
        numbers = np.array_split(list(self._states), workers)[worker]
        streams = {int(number): SampleStream(self.order, int(number)) for number in numbers}
        rows = self._config.batch_size // self.order.streams
        try:
            for number, stream in streams.items():
                stream.load_state_dict(self._states[number])
            while True:
                prepared = [stream.draw(self._prepare) for stream in streams.values() for _ in range(rows)]
                states = {number: stream.state_dict() for number, stream in streams.items()}
                yield WorkerBatch(collate(prepared, self._tokenizer), states, _take_skips(streams.values()))
        except OrderError as error:  # returned, because a raised one would carry the worker's traceback
            yield WorkerBatch(error, {}, _take_skips(streams.values()))

    def _prepare(self, sample: Sample, caption: str, generator: np.random.Generator) -> PreparedRow:
        name = f"{sample.key} of {sample.shard}"
        image = decode(sample.image, name=name)
        require_trainable_size(image.shape[1], image.shape[2], name)
        return augment(image, self._image, self._config.augmentation, generator), caption, sample.key


def _take_skips(streams: Iterable[SampleStream]) -> list[SkippedSample]:
    return [skipped for stream in streams for skipped in stream.take_skips()]


def collate(rows: Sequence[PreparedRow], tokenizer: Tokenizer) -> Batch:
    """Make a batch of prepared rows."""
    pixels, captions, keys = zip(*rows, strict=True)
    ids = tokenizer(captions)
    lengths = text_lengths(ids, tokenizer.end)
    tokens = min(tokenizer.context, math.ceil((int(lengths.max()) + 1) / 8) * 8)
    return Batch(pixels=torch.stack(pixels), ids=ids[:, :tokens].contiguous(), lengths=lengths, keys=list(keys))
