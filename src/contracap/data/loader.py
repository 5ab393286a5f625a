"""From shards to batches: for training, endless and resumable; for evaluation, every sample once."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from contracap.data.batch import Batch
from contracap.data.config import DataConfig
from contracap.data.folders import class_folders
from contracap.data.index import is_damaged, samples_in
from contracap.data.order import WINDOW, Order, OrderError, SampleStream, Skip, Source
from contracap.data.rounds import rounds
from contracap.data.shards import Sample, list_shards, samples
from contracap.data.workers import WorkerError
from contracap.image_files import ImageSizeError, decode
from contracap.images import ImageConfig, augment, resize_and_crop
from contracap.tokenizer import Tokenizer, text_lengths

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 8  # pixels; what is smaller, such as a web page's 1 x 1, is a bad sample


class TrainingBatches:
    """Endless batches in an order that depends on the data, the seed, the streams and the shuffle buffer only.

    Each stream fills the same rows of every batch. Of several ranks, each gets the rows of its streams, an equal and
    contiguous part of the batch; of its workers, each makes a part of that. All that is random besides (captions,
    crops, flips) depends on the number of the draw within the stream. So a run that resumes from `state_dict` gets the
    batches, bit for bit, that it would have had, also with another number of workers or ranks.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image: ImageConfig,
        tokenizer: Tokenizer,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """The batches from the beginning. Where no index tells how many samples a shard holds, its headers are read.

        `waiting` is entered while a batch is waited for. What it raises ends the iteration; the position is still that
        after the last batch.

        Raises:
            FileNotFoundError: if `config.train` names no shards.
            ValueError: if there are fewer samples than streams, the ranks do not divide the streams, or the seed is
                not from 0 to 2**32 - 1.
        """
        streams = config.stream_count
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be from 0 to 2**32 - 1, is {seed}")
        if streams % ranks:
            raise ValueError(
                f"{ranks} ranks cannot share {streams} streams: set data.streams to a multiple of {ranks} that divides "
                f"the batch of {config.batch_size}"
            )
        if config.captions.max_tokens is not None:
            shorter = min(config.captions.max_tokens, tokenizer.context)
            tokenizer = Tokenizer(context=shorter, vocab_size=tokenizer.vocab_size)
        self._config, self._seed = config, seed
        self._order = _order(config, seed)
        self._maker = _BatchMaker(config, self._order, image=image, tokenizer=tokenizer)
        each = streams // ranks
        self._streams = range(rank * each, (rank + 1) * each)
        self._batches, self._waiting = 0, waiting
        start = SampleStream(self._order).state_dict()
        self._states = {stream: start for stream in self._streams}
        self._skips: list[Skip] = []
        self._read = self._lost = 0  # samples, since about an epoch

    @property
    def samples(self) -> int:
        """Samples of all sources together."""
        return sum(source.samples for source in self._order.sources)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples of this rank's streams that could not be used, by kind, from the very start."""
        return dict(sum((Counter(state["skipped"]) for state in self._states.values()), Counter[str]()))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present position on.

        Raises:
            OrderError: if more than the allowed share of the samples is bad or lost, or a worker process dies.
        """
        workers = min(self._config.workers, len(self._streams))
        self._maker.start(self._states)
        with closing(rounds(self._maker.make, workers)) as parts_of_batches:
            while True:
                try:
                    with self._waiting():
                        parts = next(parts_of_batches)
                except WorkerError as error:
                    raise OrderError(
                        f"a worker process of the data died ({error}). Often that is for lack of memory, with "
                        "SIGBUS of shared memory: lower data.workers or data.shuffle_buffer"
                    ) from None
                yield self._joined(parts)

    def _joined(self, parts: Sequence["_Made"]) -> Batch:
        """The batch of the workers' parts; the position is then after it."""
        made = []
        for part in parts:
            self._skips += part.skips
            if isinstance(part.outcome, OrderError):
                raise part.outcome
            made.append(part.outcome)
            self._states |= part.states
        batch = Batch.joined(made)
        self._require_few_lost(len(batch), [skip for part in parts for skip in part.skips if skip.key is None])
        self._batches += 1
        return batch

    def _require_few_lost(self, read: int, skips: Sequence[Skip]) -> None:
        """`read`: samples that came; `skips`: what broken shards lost since."""
        lost = sum(skip.samples for skip in skips)
        epoch = sum(source.samples for source in self._order.sources) * len(self._streams) // self._order.streams
        if self._read > max(epoch, WINDOW):  # what came before fades
            self._read, self._lost = self._read // 2, self._lost // 2
        self._read += read + lost
        self._lost += lost
        if skips and self._lost > self._config.max_bad_share * max(epoch, WINDOW):
            raise OrderError(
                f"broken shards have lost {self._lost} of {self._read} samples, more than max_bad_share = "
                f"{self._config.max_bad_share} of an epoch; the last: {skips[-1].reason}. "
                "Mend the data, or raise data.max_bad_share"
            )

    def take_skips(self) -> list[Skip]:
        """What was left out since the last call."""
        taken, self._skips = self._skips, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, ready for JSON; what workers read ahead is not in it.

        Of several ranks, each has the streams it reads: `joined_states` puts them together.
        """
        streams = {str(stream): state for stream, state in self._states.items()}
        counts = [list(source.counts) for source in self._order.sources]
        return {"order": _description(self._order), "counts": counts, "batches": self._batches, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, by any number of ranks and workers.

        Raises:
            ValueError: if that was with another seed, other shards (their names and numbers of samples count, not
                their folder) or other settings of the order, or lacks streams of this rank.
        """
        if state["order"] != _description(self._order) and "counts" in state:
            self._count_damaged_as(state["counts"])
        for name, now in _description(self._order).items():
            if state["order"].get(name) != now:
                raise ValueError(
                    f"cannot resume the data: {name} was {state['order'].get(name)} and is now {now}; "
                    "set it back, or start a new run"
                )
        lacking = [stream for stream in self._streams if str(stream) not in state["streams"]]
        if lacking:
            raise ValueError(
                f"cannot resume the data: the position of stream {lacking[0]} is not in the saved state, which holds "
                f"{len(state['streams'])} of {self._order.streams}: join the states of all ranks"
            )
        self._batches = state["batches"]
        self._states = {stream: state["streams"][str(stream)] for stream in self._streams}

    def _count_damaged_as(self, counts: Sequence[Sequence[int]]) -> None:
        """Let shards that were damaged since hold what they held then, by source and shard, so that the order stays:
        what cannot be read any more is lost, and told of."""
        now = [source.counts for source in self._order.sources]
        if [len(each) for each in counts] != [len(each) for each in now]:
            return
        kept = [
            tuple(
                before if before != count and is_damaged(shard) else count
                for shard, before, count in zip(source.shards, befores, source.counts, strict=True)
            )
            for source, befores in zip(self._order.sources, counts, strict=True)
        ]
        self._order = self._maker.order = _order(self._config, self._seed, counts=kept)


def joined_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The positions of all ranks after the same batch, as one that any number of ranks can take up."""
    streams = {stream: position for state in states for stream, position in state["streams"].items()}
    return {**states[0], "streams": streams}


def _order(config: DataConfig, seed: int, *, counts: Sequence[tuple[int, ...]] | None = None) -> Order:
    """`counts`: samples of each shard by source; by default they are counted."""
    listed = [tuple(list_shards(paths, key=key)) for key, paths in config.training_paths.items()]
    counted = counts or [tuple(samples_in(shards)) for shards in listed]
    sources = []
    for source, shards, held in zip(config.sources.values(), listed, counted, strict=True):
        sources.append(Source(shards=shards, counts=held, weight=source.weight, replacement=source.replacement))
    streams = config.stream_count
    return Order(
        sources=tuple(sources),
        seed=seed,
        streams=streams,
        buffer=math.ceil(config.shuffle_buffer / streams),
        captions=config.captions,
        max_bad_share=config.max_bad_share,
    )


def _description(order: Order) -> dict[str, Any]:
    """The order in a few words, ready for JSON: equal ones mean equal samples at equal places."""
    content = [
        (shard.rpartition("/")[2], count)
        for source in order.sources
        for shard, count in zip(source.shards, source.counts, strict=True)
    ]
    return {
        "seed": order.seed,
        "streams": order.streams,
        "shuffle_buffer": order.buffer,
        "captions": [order.captions.use, order.captions.weights, *([] if order.captions.lines else ["whole texts"])],
        "mixture": [[source.weight, source.replacement] for source in order.sources],
        "samples": sum(source.samples for source in order.sources),
        "shards": len(content),
        "shard_names": hashlib.sha256("\n".join(f"{name} {count}" for name, count in content).encode()).hexdigest()[
            :16
        ],
    }


def evaluation_samples(path: str | Path | Sequence[str | Path], *, lines: bool = True) -> Iterator[Sample]:
    """Every sample of the shards once, in their order; or every image of a folder that has a subfolder for each
    class, as `ClassFolders` has them.

    Args:
        lines: each line of a `.txt` is a caption; else the whole is one.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: at a shard or a sample that cannot be read: a figure over part of the data would be another figure.
    """
    if (folders := class_folders(path)) is not None:
        yield from folders
        return
    for shard in list_shards(path):
        yield from samples(shard, lines=lines)


@dataclass(frozen=True)
class _Made:
    """A worker's part of a batch, or the error that ends it, and the positions of its streams after it."""

    outcome: Batch | OrderError
    states: dict[int, dict[str, Any]]
    skips: list[Skip]


class _BatchMaker:
    """What a worker does: worker w of W owns a W-th of the streams, and makes their part of every batch."""

    def __init__(self, config: DataConfig, order: Order, *, image: ImageConfig, tokenizer: Tokenizer) -> None:
        self._config, self.order, self._image, self._tokenizer = config, order, image, tokenizer
        self._states: dict[int, dict[str, Any]] = {}

    def start(self, states: dict[int, dict[str, Any]]) -> None:
        """Set the position from which the next iteration continues."""
        self._states = dict(states)

    def make(self, worker: int, workers: int) -> Iterator[_Made]:
        """The parts of one of the workers."""
        numbers = np.array_split(list(self._states), workers)[worker]
        streams = {int(number): SampleStream(self.order, int(number)) for number in numbers}
        rows = self._config.batch_size // self.order.streams
        try:
            for number, stream in streams.items():
                stream.load_state_dict(self._states[number])
            while True:
                prepared = [stream.draw(self._prepare) for stream in streams.values() for _ in range(rows)]
                yield _Made(
                    _collate(prepared, self._tokenizer),
                    {number: stream.state_dict() for number, stream in streams.items()},
                    _skips(streams.values()),
                )
        except OrderError as error:  # handed over as it is: a loader would wrap it in a worker's traceback
            yield _Made(error, {}, _skips(streams.values()))

    def _prepare(
        self, sample: Sample, caption: str, generator: np.random.Generator
    ) -> tuple[UInt8[Tensor, "3 size size"], str, str]:
        name = f"{sample.key} of {sample.shard}"
        picture = decode(sample.image, name=name)
        height, width = picture.shape[1:]
        if min(height, width) < SMALLEST_SIDE:
            raise ImageSizeError(f"{name}: {width} x {height} pixels; the shorter side must have {SMALLEST_SIDE}")
        return augment(picture, self._image, self._config.augmentation, generator), caption, sample.key


def _skips(streams: Iterable[SampleStream]) -> list[Skip]:
    return [skip for stream in streams for skip in stream.take_skips()]


def validation_batches(
    path: str | Sequence[str], *, batch_size: int, image: ImageConfig, tokenizer: Tokenizer, lines: bool = True
) -> Iterator[Batch]:
    """Every sample once, in order, not augmented, with its first caption; a last batch that is not full is left out.

    Raises:
        ValueError: at a sample that cannot be used, or if there is no full batch.
    """

    def prepared_rows() -> Iterator[tuple[UInt8[Tensor, "3 size size"], str, str]]:
        for sample in evaluation_samples(path, lines=lines):
            if sample.captions:
                picture = decode(sample.image, name=f"{sample.key} of {sample.shard}")
                yield resize_and_crop(picture, image), sample.captions[0], sample.key

    rows, whole = prepared_rows(), 0
    while len(prepared := list(islice(rows, batch_size))) == batch_size:
        whole += 1
        yield _collate(prepared, tokenizer)
    if not whole:
        raise ValueError(f"{path} holds fewer samples with captions than one batch of {batch_size}")


def _collate(prepared: Sequence[tuple[UInt8[Tensor, "3 size size"], str, str]], tokenizer: Tokenizer) -> Batch:
    pixels, captions, keys = zip(*prepared, strict=True)
    ids = tokenizer(captions)
    lengths = text_lengths(ids, tokenizer.end)
    tokens = min(tokenizer.context, -(-(int(lengths.max()) + 1) // 8) * 8)
    return Batch(pixels=torch.stack(pixels), ids=ids[:, :tokens].contiguous(), lengths=lengths, keys=list(keys))
