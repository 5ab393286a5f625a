"""Which sample comes when: an endless, shuffled stream that can be put down and taken up anywhere.

The order is a pure function of (seed, list of shards, number of streams, length of the shuffle buffer). Per epoch all
shards are shuffled and dealt out to the logical streams, so that over all streams an epoch holds each sample exactly
once. Within a stream, `shuffle_buffer` samples at a time are read, shuffled and handed out.

The position in a stream is six whole numbers: what lies in the buffer follows from where its reading began, so a
resumed stream reads that stretch again, a moment's work, and need not store what it held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from contracap.data.shards import Record, Sample, SampleError, ShardError, parse, records
from contracap.image import ImageError

T = TypeVar("T")

START = {"epoch": 0, "shard": 0, "member": 0, "handed_out": 0, "draws": 0, "skipped": 0}
DEAL, SHUFFLE, DRAW = range(3)  # what a random generator is for, so that no two uses share numbers


class OrderError(ValueError):
    """A stream that cannot go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """What was left out, and why. The key is None where a shard broke off."""

    shard: str
    key: str | None
    reason: str


class SampleStream:
    """One of `streams` logical streams over the shards.

    Attributes:
        skipped: samples and shards left out since the very start, also before a resume.
    """

    def __init__(
        self, shards: Sequence[str], *, seed: int, shuffle_buffer: int, stream: int = 0, streams: int = 1
    ) -> None:
        """The stream at its start.

        Raises:
            ValueError: if there are fewer shards than streams.
        """
        if len(shards) < streams:
            raise ValueError(
                f"{streams} streams need at least {streams} shards, there are {len(shards)}: "
                f"set streams to {len(shards)} or less, or cut the data into more shards"
            )
        self._shards, self._seed, self._stream, self._streams = list(shards), seed, stream, streams
        self._shuffle_buffer = shuffle_buffer
        self._fruitless: set[str] = set()  # shards that this stream has tried in vain since its last usable sample
        self._skips: list[Skip] = []
        self.load_state_dict(START)

    def draw(self, prepare: Callable[[Sample, np.random.Generator], T]) -> T:
        """What `prepare` makes of the next sample that it can use; the others are skipped and counted.

        The generator that `prepare` gets depends on the seed, the stream and the number of the draw only.

        Raises:
            OrderError: if all shards have been tried since the last usable sample.
        """
        while True:
            record = self._next_record()
            generator = np.random.default_rng([self._seed, DRAW, self._stream, self._draws])
            self._draws += 1
            try:
                prepared = prepare(parse(record), generator)
            except (SampleError, ImageError) as error:
                self._skip(Skip(shard=record.shard, key=record.key, reason=str(error)))
                continue
            self._fruitful = True
            return prepared

    def state_dict(self) -> dict[str, int]:
        """The position after the last draw: whole numbers, ready for JSON."""
        position = dict(zip(("epoch", "shard", "member"), self._buffer_start, strict=True))
        return position | {"handed_out": self._handed_out, "draws": self._draws, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes up the position of a stream made with the same arguments.

        Raises:
            OrderError: if the shards hold less than they did.
        """
        self._position = self._buffer_start = (state["epoch"], state["shard"], state["member"])
        self._reader, self._buffer, self._handed_out = self._read(), [], 0
        if state["handed_out"]:
            self._fill()
            self._handed_out = state["handed_out"]
            if self._handed_out > len(self._buffer):
                raise OrderError(
                    f"cannot resume the data: the shards ({self._shards[0]}, ...) are not those of the saved position, "
                    "samples are missing; bring the old ones back, or start a new run"
                )
            del self._buffer[len(self._buffer) - self._handed_out :]
        self._draws, self.skipped = state["draws"], state["skipped"]
        self._fruitful = self._draws > 0  # unknown: at worst a hopeless stream goes on for one more pass
        self._skips.clear()

    def take_skips(self) -> list[Skip]:
        """What was left out since the last call."""
        taken, self._skips = self._skips, []
        return taken

    def _next_record(self) -> Record:
        while not self._buffer:
            self._fill()
            if not self._buffer:
                self._end_epoch()
        self._handed_out += 1
        return self._buffer.pop()

    def _fill(self) -> None:
        self._buffer_start, self._handed_out = self._position, 0
        read = list(islice(self._reader, self._shuffle_buffer))
        generator = np.random.default_rng([self._seed, SHUFFLE, self._stream, *self._buffer_start])
        self._buffer = [read[index] for index in generator.permutation(len(read))]

    def _end_epoch(self) -> None:
        epoch = self._position[0]
        self._fruitless = set() if self._fruitful else self._fruitless.union(self._dealt(epoch))
        if self._fruitless.issuperset(self._shards):
            reason = self._skips[-1].reason if self._skips else "the shards are empty"
            raise OrderError(
                f"no usable sample in a whole pass over {len(self._shards)} shards ({self._shards[0]}, ...); "
                f"the last reason: {reason}"
            )
        self._fruitful = False
        self._position = (epoch + 1, 0, 0)
        self._reader = self._read()

    def _dealt(self, epoch: int) -> list[str]:
        """The shards of this stream in this epoch. The first stream moves on by one: all get the odd shard in turn."""
        order = np.random.default_rng([self._seed, DEAL, epoch]).permutation(len(self._shards))
        return [self._shards[index] for index in order[(self._stream + epoch) % self._streams :: self._streams]]

    def _read(self) -> Iterator[Record]:
        """The records from the present position to the end of its epoch; the position keeps pace."""
        epoch, first, start = self._position
        for number, shard in enumerate(self._dealt(epoch)[first:], first):
            passed = start if number == first else 0
            try:
                for member, record in enumerate(records(shard, passed), passed + 1):
                    self._position = (epoch, number, member)
                    yield record
            except ShardError as error:
                self._skip(Skip(shard=shard, key=None, reason=str(error)))

    def _skip(self, skip: Skip) -> None:
        self.skipped += 1
        self._skips.append(skip)
