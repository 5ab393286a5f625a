"""From shards to batches: for training, endless and resumable; for evaluation, every sample once."""

import difflib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from contracap.data.batch import Batch
from contracap.data.batch_maker import BatchMaker, PreparedRow, WorkerBatch, collate
from contracap.data.class_folders import class_folders
from contracap.data.config import DataConfig
from contracap.data.counts import is_damaged, samples_in
from contracap.data.loader_workers import run_workers
from contracap.data.order import WINDOW, Order, OrderError, SampleStream, ShardSet, SkippedSample
from contracap.data.samples import SAMPLE_SUFFIXES, Record, Sample, SampleError, parse_record, texts_in
from contracap.data.shards import ShardError, list_shards, read_records, read_samples
from contracap.data.workers import WorkerError
from contracap.image_files import decode
from contracap.images import ImageConfig, resize_and_crop
from contracap.tokenizer import Tokenizer
from contracap.wording import counted

LOOKED_AT = 10  # shards of each source, in which caption fields are looked for
LOOKED_AT_SAMPLES = 100  # of each of these shards
logger = logging.getLogger(__name__)


class TrainingBatches:
    """Endless batches in an order that depends on the data, the seed, the streams and the shuffle buffer only.

    Each stream fills the same rows of every batch. A rank gets the rows of its streams: an equal, contiguous part of
    the batch. Each of its workers makes a part of that. Captions, crops and flips depend on the number of the
    draw within the stream. So a resumed run gets the same batches as an uninterrupted one, bit for bit, also
    with another number of workers or ranks.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image: ImageConfig,
        tokenizer: Tokenizer,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start at the beginning. If no index says how many samples a shard holds, its headers are read.

        Args:
            waiting: is entered while a batch is waited for. An error that it raises ends the iteration; the position
                is still that after the last batch.

        Raises:
            FileNotFoundError: if `config.train` names no shards.
            ValueError: if there are fewer samples than streams, the ranks do not divide the streams, the seed is not
                from 0 to 2**32 - 1, or the first samples lack a field of the caption weights.
        """
        streams = config.stream_count
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be from 0 to 2**32 - 1, is {seed}")
        if streams % world_size:
            raise ValueError(
                f"{world_size} ranks cannot share {streams} streams: set data.streams to a multiple of {world_size} "
                f"that divides the batch of {config.batch_size}"
            )
        if config.captions.max_tokens is not None:
            shorter = min(config.captions.max_tokens, tokenizer.context)
            tokenizer = Tokenizer(context=shorter, vocab_size=tokenizer.vocab_size)
        self._config, self._seed = config, seed
        self._order = _build_order(config, seed)
        _require_caption_fields(self._order)
        self._bytes = [[_local_bytes(shard) for shard in source.shards] for source in self._order.sources]
        self._maker = BatchMaker(config, self._order, image=image, tokenizer=tokenizer)
        share = streams // world_size
        self._streams = range(rank * share, (rank + 1) * share)
        self._batches, self._waiting = 0, waiting
        start = SampleStream(self._order).state_dict()
        self._states = {stream: start for stream in self._streams}
        self._skipped: list[SkippedSample] = []
        self._read = self._lost = 0  # samples, since about an epoch

    @property
    def samples(self) -> int:
        """Number of samples in all sources together."""
        return self._order.samples

    @property
    def skipped(self) -> dict[str, int]:
        """Numbers of bad samples in this rank's streams since the start of the run, by kind."""
        return dict(sum((Counter(state["skipped"]) for state in self._states.values()), Counter[str]()))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the present position on.

        Raises:
            OrderError: if more than the allowed share of the samples is bad or lost, or a worker process dies.
        """
        workers = min(self._config.workers, len(self._streams))
        self._maker.start(self._states)
        with closing(run_workers(self._maker.make, workers)) as parts_of_batches:
            while True:
                try:
                    with self._waiting():
                        parts = next(parts_of_batches)
                except WorkerError as error:
                    raise OrderError(
                        f"a worker process of the data died ({error}). Often that is for lack of memory, with "
                        "SIGBUS of shared memory: lower data.workers or data.shuffle_buffer"
                    ) from None
                yield self._join(parts)

    def _join(self, parts: Sequence[WorkerBatch]) -> Batch:
        """Return the batch of the workers' parts, and move the position after it."""
        batches = []
        for part in parts:
            self._skipped += part.skipped
            if isinstance(part.batch, OrderError):
                raise part.batch
            batches.append(part.batch)
            self._states |= part.states
        batch = Batch.join(batches)
        self._require_few_lost(
            len(batch), [skipped for part in parts for skipped in part.skipped if skipped.key is None]
        )
        self._batches += 1
        return batch

    def _require_few_lost(self, read: int, losses: Sequence[SkippedSample]) -> None:
        """Stop when broken shards have lost too many samples.

        Args:
            read: samples since the last call.
            losses: samples that broken shards lost since then.
        """
        lost = sum(loss.samples for loss in losses)
        epoch = self._order.samples * len(self._streams) // self._order.streams
        if self._read > max(epoch, WINDOW):  # earlier samples count less and less
            self._read, self._lost = self._read // 2, self._lost // 2
        self._read += read + lost
        self._lost += lost
        if losses and self._lost > self._config.max_bad_share * max(epoch, WINDOW):
            raise OrderError(
                f"broken shards have lost {self._lost} of {self._read} samples, more than max_bad_share = "
                f"{self._config.max_bad_share} of an epoch; the last: {losses[-1].reason}. "
                "Mend the data, or raise data.max_bad_share"
            )

    def take_skips(self) -> list[SkippedSample]:
        """Return the samples that were skipped since the last call."""
        taken, self._skipped = self._skipped, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded, as JSON holds it.

        Each rank has the streams that it reads: `join_states` joins them.
        """
        streams = {str(stream): state for stream, state in self._states.items()}
        counts = [list(source.counts) for source in self._order.sources]
        return {
            "order": self._order.describe(),
            "counts": counts,
            "bytes": self._bytes,
            "batches": self._batches,
            "streams": streams,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, by any number of ranks and workers. If local shards have another size now,
        one line is logged.

        Raises:
            ValueError: if the state is of another order, or lacks streams of this rank. Shards are compared by their
                names and numbers of samples, not by their folder.
        """
        if state["order"] != self._order.describe() and "counts" in state:
            self._count_damaged_as(state["counts"])
        for name, now in self._order.describe().items():
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
        self._report_changed_shards(state.get("bytes", self._bytes))
        self._batches = state["batches"]
        self._states = {stream: state["streams"][str(stream)] for stream in self._streams}

    def _report_changed_shards(self, before: Sequence[Sequence[int | None]]) -> None:
        changed = [
            f"{shard} (had {then:,} bytes, has {now:,})"
            for source, befores, sizes in zip(self._order.sources, before, self._bytes, strict=True)
            for shard, then, now in zip(source.shards, befores, sizes, strict=True)
            if then is not None and now is not None and then != now
        ]
        if changed:
            logger.warning(
                f"{counted(len(changed), 'shard(s)')} changed since the checkpoint, such as {changed[0]}: the run "
                "continues at the same place of the data, in what is there now"
            )

    def _count_damaged_as(self, counts: Sequence[Sequence[int]]) -> None:
        """Keep the former number of samples of shards that are damaged now, so that the order stays the same. Samples
        that cannot be read any more are reported as lost."""
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
        self._order = self._maker.order = _build_order(self._config, self._seed, counts=kept)


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all ranks after the same batch into one that any number of ranks can load."""
    streams = {stream: position for state in states for stream, position in state["streams"].items()}
    return {**states[0], "streams": streams}


def _build_order(config: DataConfig, seed: int, *, counts: Sequence[tuple[int, ...]] | None = None) -> Order:
    """Build the order of a run.

    Args:
        counts: samples of each shard, by source; by default they are counted.
    """
    listed = [tuple(list_shards(paths, key=key)) for key, paths in config.training_paths.items()]
    counts = counts or [tuple(samples_in(shards)) for shards in listed]
    streams = config.stream_count
    return Order(
        sources=tuple(
            ShardSet(shards=shards, counts=held, weight=source.weight, replacement=source.replacement)
            for source, shards, held in zip(config.sources.values(), listed, counts, strict=True)
        ),
        seed=seed,
        streams=streams,
        buffer=math.ceil(config.shuffle_buffer / streams),
        captions=config.captions,
        max_bad_share=config.max_bad_share,
    )


def _local_bytes(shard: str) -> int | None:
    """Return the size of a shard; None if it is remote, or gone, which reading will report."""
    return os.path.getsize(shard) if "://" not in shard and os.path.isfile(shard) else None


def _require_caption_fields(order: Order) -> None:
    """Check that the caption weights are of fields that samples have. A field that is not found may be rare: a warning
    names it.

    Raises: ValueError: if such a field is nearly spelled like one that is found.
    """
    wanted, found = set(order.captions.weights), set[str]()
    for record in chain.from_iterable(_first_records(source.shards) for source in order.sources):
        if wanted <= found:
            return
        with suppress(SampleError):
            found.update(name for name, value in parse_record(record).fields.items() if texts_in(value))
    for absent in sorted(wanted - found) if found else ():
        lacking = f"data.captions.weights: none of the first samples has a field {absent!r}"
        if near := difflib.get_close_matches(absent, found, n=1):
            raise ValueError(f"{lacking}; did you mean {near[0]!r}? Leave out a field that is rarer")
        logger.warning("%s; those with texts are %s", lacking, ", ".join(sorted(found)[:20]))


def _first_records(shards: Sequence[str]) -> Iterator[Record]:
    """Yield the first records of up to `LOOKED_AT` shards, spread over all."""
    for shard in shards[:: -(-len(shards) // LOOKED_AT)]:
        with suppress(ShardError):  # which the order will report
            yield from islice(read_records(shard, suffixes=SAMPLE_SUFFIXES), LOOKED_AT_SAMPLES)


def evaluation_samples(path: str | Path | Sequence[str | Path], *, lines: bool = True) -> Iterator[Sample]:
    """Yield every sample of the shards once, in order; or every image of a folder with a subfolder for each class.

    Args:
        lines: each line of a `.txt` is a caption; otherwise the whole text is one.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: at a shard or a sample that cannot be read, because a metric is that of all samples.
    """
    if (folders := class_folders(path)) is not None:
        yield from folders
        return
    for shard in list_shards(path):
        yield from read_samples(shard, lines=lines)


def validation_batches(
    path: str | Sequence[str], *, batch_size: int, image: ImageConfig, tokenizer: Tokenizer, lines: bool = True
) -> Iterator[Batch]:
    """Yield every sample once, in order, not augmented, with its first caption. An incomplete last batch is left out.

    Raises:
        ValueError: at a sample that cannot be used, or if there is no full batch.
    """

    def prepare_rows() -> Iterator[PreparedRow]:
        for sample in evaluation_samples(path, lines=lines):
            if sample.captions:
                pixels = decode(sample.image, name=f"{sample.key} of {sample.shard}")
                yield resize_and_crop(pixels, image), sample.captions[0], sample.key

    rows, batches = prepare_rows(), 0
    while len(prepared := list(islice(rows, batch_size))) == batch_size:
        batches += 1
        yield collate(prepared, tokenizer)
    if not batches:
        raise ValueError(f"{path} holds fewer samples with captions than one batch of {batch_size}")
