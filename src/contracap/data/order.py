"""Which sample comes when: endless, shuffled streams that can be put down and taken up anywhere.

The order is a pure function of the seed, the shards and the samples each holds, the number of streams and the length
of the shuffle buffer; how many processes read the streams has no say. Each epoch shuffles the shards, lays their
samples end to end and cuts that line into as many equal spans as there are streams, through the middle of a shard if
it falls so: all streams hold the same number of samples but for one, with few shards as with many. Within its span a
stream reads a buffer of samples at a time, shuffles them and hands them out.

The position in a stream is a few whole numbers: what lies in the buffer follows from where its reading began, so a
resumed stream reads that stretch again, a moment's work, and need not store what it held.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from contracap.data.captions import CaptionConfig, all_captions, choose_caption
from contracap.data.shards import Record, Sample, SampleError, ShardError, parse, records
from contracap.image import ImageError

T = TypeVar("T")
Entry = tuple[Record, str | None]  # a sample, and its caption where that is chosen already

DEAL, SHUFFLE, DRAW, PICK, BUCKET = range(5)  # what a random generator is for, so that no two uses share numbers
WINDOW = 1000  # samples tried in a stream, among which the share of bad ones is counted


class OrderError(ValueError):
    """A stream that cannot go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """What was left out, and why. The key is None where a shard broke off; then `samples` are lost, so far as known."""

    shard: str
    key: str | None
    kind: str
    reason: str
    samples: int = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one data set.

    Attributes:
        counts: samples that each shard holds.
        weight: how often the source is drawn from, in proportion to the others.
        replacement: draw whole shards at random, again and again, in place of epochs that hold each sample once.
    """

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    weight: float = 1.0
    replacement: bool = False

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def span(self, *, seed: int, epoch: int, stream: int, streams: int) -> list[tuple[int, int, int]]:
        """What a stream reads in an epoch: (shard, first sample, sample behind the last) in their order."""
        if self.replacement:
            generator = np.random.default_rng([seed, DEAL, epoch, stream])
            drawn = generator.integers(len(self.shards), size=-(-len(self.shards) // streams))
            return [(int(shard), 0, self.counts[shard]) for shard in drawn]
        order = np.random.default_rng([seed, DEAL, epoch]).permutation(len(self.shards))
        ends = np.cumsum(np.array(self.counts)[order])
        first, behind = (int(ends[-1]) * number // streams for number in (stream, stream + 1))
        found = []
        for place in range(int(np.searchsorted(ends, first, side="right")), len(order)):
            shard = int(order[place])
            start = int(ends[place]) - self.counts[shard]
            if start >= behind:
                break
            begin, end = max(first - start, 0), min(behind - start, self.counts[shard])
            if begin < end:
                found.append((shard, begin, end))
        return found


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order depends on; the same for every process.

    Attributes:
        streams: independent orders that fill each batch together, an equal part each.
        buffer: samples of a stream that are shuffled together.
        captions: which captions stand for a picture.
        bucket: rows of a stream in a batch, if batches are to hold captions of about equal length, else None.
        quota: samples that a stream hands out in an epoch, if that is fixed, else None: all it has.
        max_bad_share: the largest share of bad samples among `WINDOW` that a stream puts up with.
    """

    sources: tuple[Source, ...]
    seed: int
    streams: int
    buffer: int
    captions: CaptionConfig = CaptionConfig()
    bucket: int | None = None
    quota: int | None = None
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.samples < self.streams:
                raise ValueError(
                    f"{len(source.shards)} shards ({source.shards[0]}, ...) hold {source.samples} samples, too few for "
                    f"{self.streams} streams: set streams to {max(1, source.samples)} or less, or bring more data"
                )


class SampleStream:
    """One of the order's streams."""

    def __init__(self, order: Order, stream: int = 0) -> None:
        """The stream at its start."""
        self._order, self._stream = order, stream
        self._sources = [
            _RecordStream(source, order, stream, seed=(order.seed + number) % 2**32, lose=self._skip)
            for number, source in enumerate(order.sources)
        ]
        weights = np.array([source.weight for source in order.sources])
        self._bounds = np.cumsum(weights / weights.sum())[:-1]
        self._draws = self._rows = self._tried = self._bad = 0
        self._skipped = Counter[str]()
        self._skips: list[Skip] = []

    def draw(self, prepare: Callable[[Sample, str, np.random.Generator], T]) -> T:
        """What `prepare` makes of the next sample, its caption and a generator; samples it cannot use are skipped.

        The generator depends on the seed, the stream and the number of the draw only.

        Raises:
            OrderError: if more than the allowed share of the last samples is bad.
        """
        while True:
            source = self._sources[self._pick()]
            record, caption = source.next()
            generator = np.random.default_rng([self._order.seed, DRAW, self._stream, self._draws])
            self._draws += 1
            self._tried += 1
            try:
                sample = parse(record)
                if caption is None:
                    caption = choose_caption(sample, self._order.captions, generator)
                prepared = prepare(sample, caption, generator)
            except (SampleError, ImageError) as error:
                self._skip(Skip(shard=record.shard, key=record.key, kind=error.kind, reason=str(error)))
                continue
            if self._tried >= WINDOW:
                self._tried = self._bad = 0
            self._rows += 1
            if self._rows == self._order.quota:
                source.next_epoch()
                self._rows = 0
            return prepared

    def state_dict(self) -> dict[str, Any]:
        """The position after the last draw, ready for JSON; `skipped` counts by kind, from the very start."""
        return {
            "sources": [source.position() for source in self._sources],
            "draws": self._draws,
            "rows": self._rows,
            "tried": self._tried,
            "bad": self._bad,
            "skipped": dict(self._skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the position of a stream of the same order.

        Raises:
            OrderError: if the shards hold less than they did.
        """
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.take_up(position)
        self._draws, self._rows, self._tried, self._bad = (state[name] for name in ("draws", "rows", "tried", "bad"))
        self._skipped = Counter(state["skipped"])

    def take_skips(self) -> list[Skip]:
        """What was left out since the last call."""
        taken, self._skips = self._skips, []
        return taken

    def _pick(self) -> int:
        if len(self._sources) == 1:
            return 0
        chance = np.random.default_rng([self._order.seed, PICK, self._stream, self._draws]).random()
        return int(np.searchsorted(self._bounds, chance, side="right"))

    def _skip(self, skip: Skip) -> None:
        self._skipped[skip.kind] += skip.samples
        self._skips.append(skip)
        self._bad += skip.samples
        if self._bad > self._order.max_bad_share * WINDOW:
            counts = ", ".join(f"{kind} {number}" for kind, number in self._skipped.most_common())
            raise OrderError(
                f"{self._bad} of the last {max(self._tried, self._bad)} samples of a stream cannot be used, more than "
                f"max_bad_share = {self._order.max_bad_share} of {WINDOW} (so far: {counts}); the last: {skip.reason}. "
                "Mend the data, or raise data.max_bad_share"
            )


class _RecordStream:
    """A stream's part of one source. What is lost of broken shards goes to `lose`, which may raise."""

    def __init__(self, source: Source, order: Order, stream: int, *, seed: int, lose: Callable[[Skip], None]) -> None:
        self._source, self._order, self._stream, self._seed, self._lose = source, order, stream, seed, lose
        self._start((0, 0, 0), fills=0)

    def next(self) -> Entry:
        """The next sample."""
        while not self._buffer:
            self._fill()
            if not self._buffer:  # the epoch's end; where it has a quota, samples come again until that is met
                self._start((self._position[0] + (self._order.quota is None), 0, 0), fills=0)
        self._handed_out += 1
        return self._buffer.pop()

    def next_epoch(self) -> None:
        """Leave out what is left of this epoch."""
        self._start((self._position[0] + 1, 0, 0), fills=0)

    def position(self) -> dict[str, int]:
        names = ("epoch", "shard", "member", "fills", "handed_out")
        return dict(zip(names, (*self._buffer_start, self._fills, self._handed_out), strict=True))

    def take_up(self, position: dict[str, int]) -> None:
        self._start((position["epoch"], position["shard"], position["member"]), fills=position["fills"])
        if position["handed_out"]:
            lose, self._lose = self._lose, lambda skip: None  # the stream told of it when it first came here
            self._fills -= 1
            self._fill()
            self._lose = lose
            self._handed_out = position["handed_out"]
            if self._handed_out > len(self._buffer):
                raise OrderError(
                    f"cannot resume the data: the shards ({self._source.shards[0]}, ...) are not those of the saved "
                    "position, samples are missing; bring the old ones back, or start a new run"
                )
            del self._buffer[len(self._buffer) - self._handed_out :]

    def _start(self, position: tuple[int, int, int], *, fills: int) -> None:
        self._position = self._buffer_start = position
        self._reader = self._read()
        self._buffer: list[Entry] = []
        self._fills, self._handed_out = fills, 0

    def _fill(self) -> None:
        self._buffer_start, self._handed_out = self._position, 0
        read = list(islice(self._reader, self._order.buffer))
        generator = np.random.default_rng([self._seed, SHUFFLE, self._stream, *self._buffer_start])
        entries = [entry for record in read for entry in self._entries(record)]
        self._buffer = [entries[index] for index in generator.permutation(len(entries))]
        if self._order.bucket is not None:
            self._buffer = self._bucketed(self._buffer, self._order.bucket, generator)
        self._fills += 1

    def _entries(self, record: Record) -> list[Entry]:
        """One for each caption that is to stand for the picture. A bad record is one: drawing it tells why."""
        if self._order.captions.use == "all":
            try:
                return [(record, caption) for caption in all_captions(parse(record), self._order.captions)]
            except SampleError:
                pass
        return [(record, None)]

    def _bucketed(self, entries: list[Entry], rows: int, generator: np.random.Generator) -> list[Entry]:
        """The same, with captions chosen, in runs of `rows` whose captions are of about equal length.

        All streams put their runs in the same order, so that a batch gets runs of equal rank from all of them.
        """
        chosen = list[Entry]()
        for record, caption in entries:
            try:
                chosen.append((record, caption or choose_caption(parse(record), self._order.captions, generator)))
            except SampleError:
                chosen.append((record, None))
        chosen.sort(key=lambda entry: len(entry[1] or ""))  # characters: close enough to tokens, and at hand
        runs = [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
        shared = np.random.default_rng([self._seed, BUCKET, self._buffer_start[0], self._fills])
        return [entry for run in shared.permutation(len(runs)) for entry in runs[run]]

    def _read(self) -> Iterator[Record]:
        """The records from the present position to the end of its epoch; the position keeps pace."""
        epoch, first, member = self._position
        span = self._source.span(seed=self._seed, epoch=epoch, stream=self._stream, streams=self._order.streams)
        for number, (index, begin, end) in enumerate(span[first:], first):
            shard, reached = self._source.shards[index], max(begin, member if number == first else 0)
            # A span that ends within a shard stops there; at a shard's end the reader looks whether that is sound.
            part = records(shard, reached)
            try:
                for record in part if end == self._source.counts[index] else islice(part, end - reached):
                    if reached == end:
                        raise ShardError(f"{shard} holds more than the {end} samples that were counted")
                    reached += 1
                    self._position = (epoch, number, reached)
                    yield record
                if reached < end:
                    raise ShardError(f"{shard} holds {reached} samples, {end} were counted")
            except ShardError as error:
                lost = max(1, end - reached)
                self._lose(Skip(shard=shard, key=None, kind="broken_shard", reason=str(error), samples=lost))
