"""From shards to batches: for training, endless and resumable; for evaluation, every sample once."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from contracap.data.batch import Batch
from contracap.data.order import START, OrderError, SampleStream, Skip
from contracap.data.shards import Sample, SampleError, list_shards, samples
from contracap.image import AugmentationConfig, ImageConfig, augment, decode, resize_and_crop
from contracap.tokenizer import Tokenizer, lengths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which order.

    Raises:
        ValueError: if a number is too small, or `streams` is no multiple of `workers`.
    """

    train: str | tuple[str, ...]  # folders of tar shards, or shards
    validation: str | tuple[str, ...] | None = None
    batch_size: int
    shuffle_buffer: int = 2000  # samples that are shuffled together, per stream
    streams: int = 1  # independent orders that take turns, batch by batch; decides the order, unlike `workers`
    workers: int = 0  # processes that read and decode; 0: the calling one
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("shuffle_buffer", 1), ("streams", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, is {getattr(self, name)}")
        if self.workers and self.streams % self.workers:
            raise ValueError(
                f"streams ({self.streams}) must be a multiple of workers ({self.workers}): "
                f"set streams to {self.workers} or a multiple of it"
            )


class TrainingBatches:
    """Endless batches in an order that depends on the data, the seed, the streams and the shuffle buffer only.

    Batch i comes from stream i modulo `streams`. All else that is random (captions, crops, flips) depends on the
    number of the draw within the stream. So a run that resumes from `state_dict` gets the batches, bit for bit, that
    it would have had, also with another number of workers.
    """

    def __init__(self, config: DataConfig, *, image: ImageConfig, tokenizer: Tokenizer, seed: int) -> None:
        """The batches from the beginning.

        Raises:
            FileNotFoundError: if `config.train` names no shards.
            ValueError: if there are fewer shards than streams, or the seed is not from 0 to 2**32 - 1.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be from 0 to 2**32 - 1, is {seed}")
        shards = list_shards(config.train)
        self._config = config
        self._maker = _BatchMaker(config, shards, image=image, tokenizer=tokenizer, seed=seed)
        self._maker.stream(0)  # refuses too few shards now, not at the first batch
        names = "\n".join(shard.rpartition("/")[2] for shard in shards)
        self._order: dict[str, Any] = {
            "seed": seed,
            "streams": config.streams,
            "shuffle_buffer": config.shuffle_buffer,
            "shards": len(shards),
            "shard_names": hashlib.sha256(names.encode()).hexdigest()[:16],
        }
        self._batches = 0
        self._states = [START] * config.streams

    @property
    def skipped(self) -> int:
        """Samples and shards that turned out unusable up to the last batch that was yielded."""
        return sum(state["skipped"] for state in self._states)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present position on. What is skipped is logged as a warning, one line each.

        Raises:
            OrderError: if a whole pass over the data gives nothing, or the shards hold less than when the state that
                was loaded was saved.
        """
        self._maker.start(self._batches, self._states)
        loader = DataLoader(
            self._maker,
            batch_size=None,
            num_workers=self._config.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, or the loader would draw from the model's random numbers
        )
        for made in loader:
            for skip in made.skips:
                logger.warning("skipped: %s", skip.reason)
            if isinstance(made.outcome, OrderError):
                raise made.outcome
            self._states[self._batches % self._config.streams] = made.state
            self._batches += 1
            yield made.outcome

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, ready for JSON; what workers read ahead is not in it."""
        return {"order": self._order, "batches": self._batches, "streams": list(self._states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: if that was with another seed, other shards (their names count, not their folder), or another
                number of streams or length of the shuffle buffer: the order would not be the same.
        """
        for name, now in self._order.items():
            if state["order"].get(name) != now:
                raise ValueError(
                    f"cannot resume the data: {name} was {state['order'].get(name)} and is now {now}; "
                    "set it back, or start a new run"
                )
        self._batches, self._states = state["batches"], list(state["streams"])


def evaluation_samples(path: str | Path | Sequence[str | Path]) -> Iterator[Sample]:
    """Every sample of the shards once, in their order.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: at a shard or a sample that cannot be read: a figure over part of the data would be another figure.
    """
    for shard in list_shards(path):
        yield from samples(shard)


@dataclass(frozen=True)
class _Made:
    """A batch, or the error that ends its stream, and the position of the stream behind it."""

    outcome: Batch | OrderError
    state: dict[str, int]
    skips: list[Skip]

    def pin_memory(self) -> "_Made":
        return replace(self, outcome=self.outcome.pin_memory()) if isinstance(self.outcome, Batch) else self


class _BatchMaker(IterableDataset):
    """What a worker does: worker w of W makes every W-th batch from batch w on, and so owns every W-th stream."""

    def __init__(
        self, config: DataConfig, shards: Sequence[str], *, image: ImageConfig, tokenizer: Tokenizer, seed: int
    ) -> None:
        self._config, self._shards, self._seed = config, shards, seed
        self._image, self._tokenizer = image, tokenizer
        self._first, self._states = 0, [START] * config.streams

    def start(self, first: int, states: list[dict[str, int]]) -> None:
        """The position from which the next iteration goes on."""
        self._first, self._states = first, list(states)

    def stream(self, number: int) -> SampleStream:
        stream = SampleStream(
            self._shards,
            seed=self._seed,
            shuffle_buffer=self._config.shuffle_buffer,
            stream=number,
            streams=self._config.streams,
        )
        stream.load_state_dict(self._states[number])
        return stream

    def __iter__(self) -> Iterator[_Made]:
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        owned: dict[int, SampleStream] = {}
        for batch in count(self._first + offset, step):
            number = batch % self._config.streams
            try:
                if number not in owned:
                    owned[number] = self.stream(number)
                stream = owned[number]
                prepared = [stream.draw(self._prepare) for _ in range(self._config.batch_size)]
            except OrderError as error:  # handed over as it is: a loader would wrap it in a worker's traceback
                yield _Made(error, self._states[number], [])
                return
            yield _Made(_collate(prepared, self._tokenizer), stream.state_dict(), stream.take_skips())

    def _prepare(self, sample: Sample, generator: np.random.Generator) -> tuple[UInt8[Tensor, "3 size size"], str, str]:
        if not sample.captions:
            raise SampleError(f"sample {sample.key} of {sample.shard} has no caption")
        caption = sample.captions[generator.integers(len(sample.captions))]
        picture = decode(sample.image, name=f"{sample.key} of {sample.shard}")
        return augment(picture, self._image, self._config.augmentation, generator), caption, sample.key


def validation_batches(
    path: str | Sequence[str], *, batch_size: int, image: ImageConfig, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Every sample once, in order, not augmented, with its first caption; a last batch that is not full is left out.

    Raises:
        ValueError: at a sample that cannot be used, or if there is no full batch.
    """
    whole = 0
    rows = (
        (resize_and_crop(decode(sample.image, name=sample.key), image), sample.captions[0], sample.key)
        for sample in evaluation_samples(path)
        if sample.captions
    )
    while len(prepared := list(islice(rows, batch_size))) == batch_size:
        whole += 1
        yield _collate(prepared, tokenizer)
    if not whole:
        raise ValueError(f"{path} holds fewer samples with captions than one batch of {batch_size}")


def _collate(prepared: Sequence[tuple[UInt8[Tensor, "3 size size"], str, str]], tokenizer: Tokenizer) -> Batch:
    pixels, captions, keys = zip(*prepared, strict=True)
    ids = tokenizer(captions)
    longest = int(lengths(ids, tokenizer.end).max())
    tokens = min(tokenizer.context, -(-(longest + 1) // 8) * 8)
    return Batch(pixels=torch.stack(pixels), ids=ids[:, :tokens].contiguous(), keys=list(keys))
