"""The order of samples: endless, shuffled streams that can stop and resume anywhere.

The order is a pure function of the seed, the shards and their numbers of samples, the number of streams and the length
of the shuffle buffer. It does not depend on the number of processes. Each epoch shuffles the shards, puts their samples
in one long line and cuts it into equal spans, one for each stream. A cut may fall inside a shard. Within its span a
stream reads a buffer of samples at a time, shuffles them and hands them out.

The position in a stream is a few integers. A resumed stream reads its buffer again, so the buffer is not stored. Every
sample that a shard is said to hold has a place in the order. If it cannot be read, it is reported as lost in its turn,
and no other sample moves.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from contracap.data.captions import CaptionConfig, all_captions, choose_caption
from contracap.data.samples import SAMPLE_SUFFIXES, Record, Sample, SampleError, parse_record
from contracap.data.shards import ShardError, layout_fault, read_records
from contracap.image_files import ImageError
from contracap.wording import counted

T = TypeVar("T")

DEAL, SHUFFLE, DRAW, PICK = range(4)  # parts of seeds, so that no two uses of random numbers share them
WINDOW = 1000  # recent samples of a stream, of which a share may be bad
MAX_BROKEN_SHARDS = 20  # in a row, without a sample in between


class OrderError(ValueError):
    """A stream that cannot continue. The message says why."""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that was skipped, and why. The key is None for `samples` that a broken shard lost."""

    shard: str
    key: str | None
    kind: str
    reason: str
    samples: int = 1


Slot = Record | SkippedSample  # a place in the order, with its sample or its loss
BufferedSlot = tuple[Slot, str | None]  # with the caption, if that is chosen already


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """The shards of one data set.

    Attributes:
        counts: samples that each shard is said to hold. They alone decide the order.
        weight: how often the set is drawn from, in proportion to the others.
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
        """Return what a stream reads in an epoch, in order: (shard, first sample, sample after the last)."""
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
    """All settings that the order depends on; the same for every process.

    Attributes:
        streams: independent orders, each of which fills an equal part of each batch.
        buffer: samples of a stream that are shuffled together.
        captions: how the caption of an image is chosen.
        max_bad_share: the largest allowed share of bad samples among `WINDOW` of a stream. Samples that broken shards
            lose do not count here.
    """

    sources: tuple[ShardSet, ...]
    seed: int
    streams: int
    buffer: int
    captions: CaptionConfig = CaptionConfig()
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.samples < self.streams:
                raise ValueError(
                    f"{counted(source.samples, 'sample(s)')} in {counted(len(source.shards), 'shard(s)')} "
                    f"({source.shards[0]}, ...), too few for {self.streams} streams: set streams to "
                    f"{max(1, source.samples)} or less, or bring more data. If images have names with several dots, "
                    "`contracap shards show` tells how to rename them"
                )

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    def describe(self) -> dict[str, Any]:
        """Return a summary, as JSON holds it: equal summaries mean equal samples in equal places."""
        shards = [
            (shard.rpartition("/")[2], count)
            for source in self.sources
            for shard, count in zip(source.shards, source.counts, strict=True)
        ]
        names = "\n".join(f"{name} {count}" for name, count in shards)
        return {
            "seed": self.seed,
            "streams": self.streams,
            "shuffle_buffer": self.buffer,
            "captions": [self.captions.use, self.captions.weights, *([] if self.captions.lines else ["whole texts"])],
            "mixture": [[source.weight, source.replacement] for source in self.sources],
            "samples": self.samples,
            "shards": len(shards),
            "shard_names": hashlib.sha256(names.encode()).hexdigest()[:16],
        }


class SampleStream:
    """A stream of the order."""

    def __init__(self, order: Order, stream: int = 0) -> None:
        """Start at the beginning of the order."""
        self._order, self._stream = order, stream
        self._sources = [
            _SlotStream(source, order, stream, seed=(order.seed + number) % 2**32)
            for number, source in enumerate(order.sources)
        ]
        weights = np.array([source.weight for source in order.sources])
        self._bounds = np.cumsum(weights / weights.sum())[:-1]
        self._draws = self._tried = self._bad = 0
        self._without_image = 0  # records in a row
        self._skip_counts = Counter[str]()
        self._skipped: list[SkippedSample] = []

    def draw(self, prepare: Callable[[Sample, str, np.random.Generator], T]) -> T:
        """Return what `prepare` makes of the next sample, its caption and a generator. Bad samples are skipped.

        The generator depends on the seed, the stream and the number of the draw only.

        Raises:
            OrderError: if more than the allowed share of the last samples is bad, or one shard after another is broken.
        """
        while True:
            source = self._sources[self._pick()]
            slot, caption = source.next()
            generator = np.random.default_rng([self._order.seed, DRAW, self._stream, self._draws])
            self._draws += 1
            if isinstance(slot, SkippedSample):
                self._skip(slot)
                continue
            self._tried += 1
            try:
                sample = parse_record(slot, lines=self._order.captions.lines)
                if caption is None:
                    caption = choose_caption(sample, self._order.captions, generator)
                prepared = prepare(sample, caption, generator)
            except (SampleError, ImageError) as error:
                self._skip(SkippedSample(shard=slot.shard, key=slot.key, kind=error.kind, reason=str(error)))
                self._count_bad(error, slot.shard)
                continue
            self._without_image = 0
            if self._tried >= WINDOW:  # earlier samples count less and less
                self._tried, self._bad = self._tried // 2, self._bad // 2
            return prepared

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last draw, for JSON. `skipped` counts by kind since the start of the run."""
        return {
            "sources": [source.state_dict() for source in self._sources],
            "draws": self._draws,
            "tried": self._tried,
            "bad": self._bad,
            "skipped": dict(self._skip_counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a stream of the same order."""
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(position)
        self._draws, self._tried, self._bad = (state[name] for name in ("draws", "tried", "bad"))
        self._skip_counts = Counter(state["skipped"])

    def take_skips(self) -> list[SkippedSample]:
        """Return the samples that were skipped since the last call."""
        taken, self._skipped = self._skipped, []
        return taken

    def _pick(self) -> int:
        if len(self._sources) == 1:
            return 0
        chance = np.random.default_rng([self._order.seed, PICK, self._stream, self._draws]).random()
        return int(np.searchsorted(self._bounds, chance, side="right"))

    def _skip(self, skipped: SkippedSample) -> None:
        self._skip_counts[skipped.kind] += skipped.samples
        last = self._skipped[-1] if self._skipped else None
        if skipped.key is None and last is not None and replace(last, samples=skipped.samples) == skipped:
            self._skipped.pop()  # one line for all of a shard
            skipped = replace(skipped, samples=last.samples + skipped.samples)
        self._skipped.append(skipped)

    def _count_bad(self, error: SampleError | ImageError, shard: str) -> None:
        if error.kind == "no_picture":  # such as notes: not a bad sample, unless there is nothing else
            self._tried -= 1
            self._without_image += 1
            if self._without_image >= WINDOW:
                raise OrderError(f"{WINDOW} groups in a row have no image; the last: {error}")
            return
        self._bad += 1
        if self._bad > self._order.max_bad_share * WINDOW:
            counts = ", ".join(f"{kind} {number}" for kind, number in self._skip_counts.most_common())
            raise OrderError(
                f"{self._bad} of the last {self._tried} samples of a stream cannot be used, more than max_bad_share = "
                f"{self._order.max_bad_share} of {WINDOW} (so far: {counts}); the last: {error}."
                f"{layout_fault(shard)} Mend the data, or raise data.max_bad_share"
            )


class _SlotStream:
    """A stream's part of one source, slot by slot."""

    def __init__(self, source: ShardSet, order: Order, stream: int, *, seed: int) -> None:
        self._source, self._order, self._stream, self._seed = source, order, stream, seed
        self._broken_in_a_row = 0
        self._start((0, 0, 0))

    def next(self) -> BufferedSlot:
        """Return the next slot.

        Raises:
            OrderError: if more than `MAX_BROKEN_SHARDS` in a row gave no sample.
        """
        while not self._buffer:
            self._fill()
            if not self._buffer:  # the epoch's end
                self._start((self._position[0] + 1, 0, 0))
        self._handed_out += 1
        # One is read for each that is handed out, so that no draw waits for a whole buffer.
        self._ahead += islice(self._reader, len(self._ahead) < self._order.buffer)
        return self._buffer.pop()

    def state_dict(self) -> dict[str, int]:
        """Return the position at which the buffer begins, and how many of its slots are handed out."""
        names = ("epoch", "shard", "member", "handed_out")
        return dict(zip(names, (*self._buffer_start, self._handed_out), strict=True))

    def load_state_dict(self, position: dict[str, int]) -> None:
        self._start((position["epoch"], position["shard"], position["member"]))
        if position["handed_out"]:
            self._fill()
            self._handed_out = position["handed_out"]
            del self._buffer[max(0, len(self._buffer) - self._handed_out) :]

    def _start(self, position: tuple[int, int, int]) -> None:
        self._position = self._buffer_start = self._ahead_start = position
        self._reader = self._read()
        self._buffer: list[BufferedSlot] = []
        self._ahead: list[Slot] = []  # of the next buffer
        self._handed_out = 0

    def _fill(self) -> None:
        """Read and shuffle the next buffer."""
        self._ahead += islice(self._reader, self._order.buffer - len(self._ahead))
        slots, self._ahead = self._ahead, []
        self._buffer_start, self._ahead_start = self._ahead_start, self._position
        self._handed_out = 0
        generator = np.random.default_rng([self._seed, SHUFFLE, self._stream, *self._buffer_start])
        captioned = [buffered for slot in slots for buffered in self._with_captions(slot)]
        self._buffer = [captioned[index] for index in generator.permutation(len(captioned))]

    def _with_captions(self, slot: Slot) -> list[BufferedSlot]:
        """Repeat a slot for each caption that is used. A bad record is not repeated; drawing it reports it."""
        if self._order.captions.use == "all" and isinstance(slot, Record):
            try:
                sample = parse_record(slot, lines=self._order.captions.lines)
                return [(slot, caption) for caption in all_captions(sample, self._order.captions)]
            except SampleError:
                pass
        return [(slot, None)]

    def _read(self) -> Iterator[Slot]:
        """Yield the slots from the present position to the end of its epoch, and move the position along."""
        epoch, first, member = self._position
        span = self._source.span(seed=self._seed, epoch=epoch, stream=self._stream, streams=self._order.streams)
        for number, (index, begin, end) in enumerate(span[first:], first):
            shard, reached = self._source.shards[index], max(begin, member if number == first else 0)
            counted, part, more = self._source.counts[index], read_records(shard, reached, suffixes=SAMPLE_SUFFIXES), 0
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
                yield SkippedSample(shard=shard, key=None, kind="broken_shard", reason=reason, samples=more)
            if reached < end:
                self._broken_in_a_row += 1
                if self._broken_in_a_row > MAX_BROKEN_SHARDS:
                    raise OrderError(f"{self._broken_in_a_row} shards in a row cannot be read; the last: {reason}")
            while reached < end:
                reached += 1
                self._position = (epoch, number, reached)
                yield SkippedSample(shard=shard, key=None, kind="broken_shard", reason=reason)
