"""Which sample comes when: endless, shuffled streams that can be put down and taken up anywhere.

The order is a pure function of the seed, the shards and the samples each holds, the number of streams and the length
of the shuffle buffer; how many processes read the streams has no say. Each epoch shuffles the shards, lays their
samples end to end and cuts that line into as many equal spans as there are streams, through the middle of a shard if
it falls so: all streams hold the same number of samples but for one, with few shards as with many. Within its span a
stream reads a buffer of samples at a time, shuffles them and hands them out.

The position in a stream is a few whole numbers: what lies in the buffer follows from where its reading began, so a
resumed stream reads that stretch again, a moment's work, and need not store what it held. Every sample that a shard is
said to hold has its place in the order: one that cannot be read is lost and told of in its turn, and no other moves.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from contracap.data.captions import CaptionConfig, all_captions, choose_caption
from contracap.data.shards import SAMPLE_SUFFIXES, Record, Sample, SampleError, ShardError, layout_fault, parse, records
from contracap.image_files import ImageError

T = TypeVar("T")

DEAL, SHUFFLE, DRAW, PICK = range(4)  # what a random generator is for, so that no two uses share numbers
WINDOW = 1000  # samples tried in a stream, among which the share of bad ones is counted
MAX_BROKEN_SHARDS = 20  # in a row, without a sample in between


class OrderError(ValueError):
    """A stream that cannot continue; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """What was left out, and why. The key is None for `samples` that a broken shard was to give."""

    shard: str
    key: str | None
    kind: str
    reason: str
    samples: int = 1


Slot = Record | Skip  # a place in the order: the sample that lies there, or that it is lost
Entry = tuple[Slot, str | None]  # and the caption, where that is chosen already


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one data set.

    Attributes:
        counts: samples that each shard is said to hold. They alone decide the order: what cannot be read is lost, and
            nothing else moves.
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
        """What a stream reads in an epoch: (shard, first sample, sample after the last) in their order."""
        if self.replacement:
            generator = np.random.default_rng([seed, DEAL, epoch, stream])
            drawn = generator.integers(len(self.shards), size=-(-len(self.shards) // streams))
            return [(int(shard), 0, self.counts[shard]) for shard in drawn]
        order = np.random.default_rng([seed, DEAL, epoch]).permutation(len(self.shards))
        ends = np.cumsum(np.array(self.counts)[order])
        first, stop = (int(ends[-1]) * number // streams for number in (stream, stream + 1))
        found = []
        for place in range(int(np.searchsorted(ends, first, side="right")), len(order)):
            shard = int(order[place])
            start = int(ends[place]) - self.counts[shard]
            if start >= stop:
                break
            begin, end = max(first - start, 0), min(stop - start, self.counts[shard])
            if begin < end:
                found.append((shard, begin, end))
        return found


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order depends on; the same for every process.

    Attributes:
        streams: independent orders that fill each batch together, an equal part each.
        buffer: samples of a stream that are shuffled together.
        captions: which captions stand for an image.
        max_bad_share: the largest share of bad samples among `WINDOW` that a stream puts up with. What broken shards
            lose does not count here.
    """

    sources: tuple[Source, ...]
    seed: int
    streams: int
    buffer: int
    captions: CaptionConfig = CaptionConfig()
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
            _SlotStream(source, order, stream, seed=(order.seed + number) % 2**32)
            for number, source in enumerate(order.sources)
        ]
        weights = np.array([source.weight for source in order.sources])
        self._bounds = np.cumsum(weights / weights.sum())[:-1]
        self._draws = self._tried = self._bad = 0
        self._in_vain = 0  # groups without an image since the last sample
        self._skipped = Counter[str]()
        self._skips: list[Skip] = []

    def draw(self, prepare: Callable[[Sample, str, np.random.Generator], T]) -> T:
        """What `prepare` makes of the next sample, its caption and a generator; samples it cannot use are skipped.

        The generator depends on the seed, the stream and the number of the draw only.

        Raises:
            OrderError: if more than the allowed share of the last samples is bad, or one shard after the other is.
        """
        while True:
            source = self._sources[self._pick()]
            slot, caption = source.next()
            generator = np.random.default_rng([self._order.seed, DRAW, self._stream, self._draws])
            self._draws += 1
            if isinstance(slot, Skip):
                self._skip(slot)
                continue
            self._tried += 1
            try:
                sample = parse(slot, lines=self._order.captions.lines)
                if caption is None:
                    caption = choose_caption(sample, self._order.captions, generator)
                prepared = prepare(sample, caption, generator)
            except (SampleError, ImageError) as error:
                self._skip(Skip(shard=slot.shard, key=slot.key, kind=error.kind, reason=str(error)))
                self._count_bad(error, slot.shard)
                continue
            self._in_vain = 0
            if self._tried >= WINDOW:  # what came before fades
                self._tried, self._bad = self._tried // 2, self._bad // 2
            return prepared

    def state_dict(self) -> dict[str, Any]:
        """The position after the last draw, ready for JSON; `skipped` counts by kind, from the very start."""
        return {
            "sources": [source.position() for source in self._sources],
            "draws": self._draws,
            "tried": self._tried,
            "bad": self._bad,
            "skipped": dict(self._skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the position of a stream of the same order."""
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.take_up(position)
        self._draws, self._tried, self._bad = (state[name] for name in ("draws", "tried", "bad"))
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
        if skip.key is None and self._skips and replace(self._skips[-1], samples=skip.samples) == skip:
            skip = replace(skip, samples=self._skips.pop().samples + skip.samples)  # one line for all of a shard
        self._skips.append(skip)

    def _count_bad(self, error: SampleError | ImageError, shard: str) -> None:
        if error.kind == "no_picture":  # notes among the samples, say: not a bad one, unless there is nothing else
            self._tried -= 1
            self._in_vain += 1
            if self._in_vain >= WINDOW:
                raise OrderError(f"{WINDOW} groups in a row have no image; the last: {error}")
            return
        self._bad += 1
        if self._bad > self._order.max_bad_share * WINDOW:
            counts = ", ".join(f"{kind} {number}" for kind, number in self._skipped.most_common())
            raise OrderError(
                f"{self._bad} of the last {self._tried} samples of a stream cannot be used, more than max_bad_share = "
                f"{self._order.max_bad_share} of {WINDOW} (so far: {counts}); the last: {error}."
                f"{layout_fault(shard)} Mend the data, or raise data.max_bad_share"
            )


class _SlotStream:
    """A stream's part of one source, slot by slot."""

    def __init__(self, source: Source, order: Order, stream: int, *, seed: int) -> None:
        self._source, self._order, self._stream, self._seed = source, order, stream, seed
        self._broken_in_a_row = 0
        self._start((0, 0, 0))

    def next(self) -> Entry:
        """The next slot.

        Raises:
            OrderError: if `MAX_BROKEN_SHARDS` were read in vain since the last sample.
        """
        while not self._buffer:
            self._fill()
            if not self._buffer:  # the epoch's end
                self._start((self._position[0] + 1, 0, 0))
        self._handed_out += 1
        self._ahead += islice(self._reader, len(self._ahead) < self._order.buffer)  # one for one: no long halts
        return self._buffer.pop()

    def position(self) -> dict[str, int]:
        """Where the buffer began, and how far it is handed out."""
        names = ("epoch", "shard", "member", "handed_out")
        return dict(zip(names, (*self._buffer_start, self._handed_out), strict=True))

    def take_up(self, position: dict[str, int]) -> None:
        self._start((position["epoch"], position["shard"], position["member"]))
        if position["handed_out"]:
            self._fill()
            self._handed_out = position["handed_out"]
            del self._buffer[max(0, len(self._buffer) - self._handed_out) :]

    def _start(self, position: tuple[int, int, int]) -> None:
        self._position = self._buffer_start = self._ahead_start = position
        self._reader = self._read()
        self._buffer: list[Entry] = []
        self._ahead: list[Slot] = []  # of the next buffer
        self._handed_out = 0

    def _fill(self) -> None:
        """The next buffer, in its order."""
        self._ahead += islice(self._reader, self._order.buffer - len(self._ahead))
        slots, self._ahead = self._ahead, []
        self._buffer_start, self._ahead_start = self._ahead_start, self._position
        self._handed_out = 0
        generator = np.random.default_rng([self._seed, SHUFFLE, self._stream, *self._buffer_start])
        entries = [entry for slot in slots for entry in self._entries(slot)]
        self._buffer = [entries[index] for index in generator.permutation(len(entries))]

    def _entries(self, slot: Slot) -> list[Entry]:
        """One for each caption that is to stand for the image. A bad record is one: drawing it tells why."""
        if self._order.captions.use == "all" and isinstance(slot, Record):
            try:
                sample = parse(slot, lines=self._order.captions.lines)
                return [(slot, caption) for caption in all_captions(sample, self._order.captions)]
            except SampleError:
                pass
        return [(slot, None)]

    def _read(self) -> Iterator[Slot]:
        """The slots from the present position to the end of its epoch; the position keeps pace."""
        epoch, first, member = self._position
        span = self._source.span(seed=self._seed, epoch=epoch, stream=self._stream, streams=self._order.streams)
        for number, (index, begin, end) in enumerate(span[first:], first):
            shard, reached = self._source.shards[index], max(begin, member if number == first else 0)
            counted, part, more = self._source.counts[index], records(shard, reached, suffixes=SAMPLE_SUFFIXES), 0
            reason = f"{shard} holds fewer samples than the {counted} that were counted"
            try:
                for record in islice(part, end - reached):
                    reached += 1
                    self._position = (epoch, number, reached)
                    self._broken_in_a_row = 0
                    yield record
                more = sum(1 for _ in part) if end == counted else 0
            except ShardError as error:
                reason = str(error)
            if more:
                reason = f"{shard} holds {more} samples more than the {counted} that were counted"
                yield Skip(shard=shard, key=None, kind="broken_shard", reason=reason, samples=more)
            if reached < end:
                self._broken_in_a_row += 1
                if self._broken_in_a_row > MAX_BROKEN_SHARDS:
                    raise OrderError(f"{self._broken_in_a_row} shards in a row cannot be read; the last: {reason}")
            while reached < end:
                reached += 1
                self._position = (epoch, number, reached)
                yield Skip(shard=shard, key=None, kind="broken_shard", reason=reason)
