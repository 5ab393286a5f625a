"""Ranks that stand still: which of them, where, and for which the others wait."""

import json
import logging
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from contracap.parallel import ProcessGroup

DATA, STEP, CHECKPOINT, EVALUATION, RECORD = (
    "waiting for data",
    "in the step",
    "writing a checkpoint",
    "evaluating",
    "recording",
)
FIRST_STEP = 4  # times as long as others: code is compiled, workers start, caches fill
LOOKS = 10  # per `seconds` of the watchdog
MAX_NAMED = 8  # ranks in a message
PACKAGE, COLLECTIVES = Path(__file__).parent.parent, Path(dist.__file__).parent
logger = logging.getLogger(__name__)


class Beat(NamedTuple):
    """The phase that the training loop is in.

    Attributes:
        step: number of the current step, from 1.
        since: start of the phase, by the monotonic clock.
    """

    step: int
    phase: str
    since: float


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A rank that stands still.

    Attributes:
        seconds: how long it has stood still.
        place: the innermost line of this package on its stack.
        waits: it probably waits for other ranks.
    """

    step: int
    phase: str
    seconds: float
    place: str
    waits: bool

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step} for {self.seconds:.0f} s, at {self.place}"


class Watchdog:
    """Watches the training loop of the thread that creates it, from a thread of its own, without collectives.

    Each phase may take `seconds`: the wait for a batch, a step, a checkpoint, an evaluation. The first step may take
    four times as long. Ranks that stand still say so in the store that torchrun gave them, and rank 0 compares what
    they say. A healthy run sends nothing.
    """

    def __init__(self, seconds: float, process_group: ProcessGroup, *, start: int):
        """Every rank must create one.

        Args:
            seconds: longest time for a phase; 0 turns the watchdog off.
            start: steps done before.
        """
        self._seconds, self._process_group = seconds, process_group
        self._first = start + 1
        self._beat = Beat(self._first, DATA, time.monotonic())
        self._watched = threading.get_ident()
        self._name = process_group.broadcast(secrets.token_hex(8))  # no rank reads the reports of another run
        self._store: dist.Store | None = None
        self._stalled: Beat | None = None
        self._compare_at: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._seconds:
            self._thread.join(timeout=5)  # its store may be gone

    def enter(self, phase: str) -> None:
        """Note that the loop enters another phase."""
        self._beat = Beat(self._beat.step, phase, time.monotonic())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context for a phase between two steps; after it, the loop is in its previous phase again."""
        before = self._beat
        self._beat = Beat(before.step - 1, name, time.monotonic())  # of the step that is done
        yield
        self._beat = Beat(before.step, before.phase, time.monotonic())

    def step(self, done: int) -> None:
        """Note that `done` steps are done."""
        self._beat = Beat(done + 1, self._beat.phase, time.monotonic())

    def _watch(self) -> None:
        pause = self._seconds / LOOKS
        while not self._ended.wait(pause):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        beat, rank = self._beat, self._process_group.rank
        if self._stalled is not None and beat is not self._stalled:
            seconds, before = beat.since - self._stalled.since, self._stalled
            logger.warning("rank %d continues, after %.0f s %s of step %d", rank, seconds, before.phase, before.step)
            self._stalled = self._compare_at = None
            self._publish(None)
        if self._stalled is None and now - beat.since > self._seconds * (FIRST_STEP if beat.step == self._first else 1):
            frame = sys._current_frames()[self._watched]
            place, called = _position(frame)
            waits = called or beat.phase == STEP  # in a step, C++ may wait without a frame in Python
            stall = Stall(step=beat.step, phase=beat.phase, seconds=now - beat.since, place=place, waits=waits)
            stack = "".join(traceback.format_stack(frame))
            logger.warning("rank %d stands still: %s\n%s", rank, stall, stack.rstrip())
            self._stalled = beat
            self._publish(stall)
            # Other ranks may reach their limit a little later.
            self._compare_at = (
                now + 2 * self._seconds / LOOKS if rank == 0 and self._process_group.world_size > 1 else None
            )
        if self._compare_at is not None and now >= self._compare_at:
            self._compare_at = None
            self._compare()

    def _publish(self, stall: Stall | None) -> None:
        """Tell rank 0 that this rank stands still, or, with None, that it continues."""
        if self._process_group.world_size == 1:
            return
        try:
            self._connected().set(str(self._process_group.rank), json.dumps(asdict(stall) if stall else None))
        except RuntimeError as error:
            logger.warning("rank %d cannot tell the others: %s", self._process_group.rank, error)

    def _compare(self) -> None:
        stalls: dict[int, Stall] = {}
        try:
            store = self._connected()
            for rank in range(self._process_group.world_size):
                told = json.loads(store.get(str(rank))) if store.check([str(rank)]) else None
                if told is not None:
                    stalls[rank] = Stall(**told)
        except RuntimeError as error:
            logger.warning("what the other ranks do is not known: %s", error)
            return
        logger.warning("%s", describe_stalls(stalls, self._process_group.world_size))

    def _connected(self) -> dist.Store:
        """Return this thread's own connection: the process group's may be the one that the loop waits for."""
        if self._store is None:
            client = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=30),
            )
            self._store = dist.PrefixStore(f"watchdog/{self._name}", client)
        return self._store


def describe_stalls(stalls: Mapping[int, Stall], count: int) -> str:
    """Name the ranks that the others wait for: those that have done fewer steps, else those in a phase of their own,
    else those that have not reported.

    Args:
        count: number of all ranks.
    """
    least = min(stall.step for stall in stalls.values())
    behind = [rank for rank, stall in stalls.items() if stall.step == least and not stall.waits]
    if not behind and any(stall.step > least for stall in stalls.values()):
        behind = [rank for rank, stall in stalls.items() if stall.step == least]
    if behind:
        named = "; ".join(f"rank {rank}, {stalls[rank]}" for rank in behind[:MAX_NAMED])
        return f"the ranks wait for {named}{_others(behind)}"
    silent = [rank for rank in range(count) if rank not in stalls]
    if silent:
        return (
            f"the ranks wait for {_listed(silent)}, from which there is no word: gone, or at work on something that no "
            "other rank does"
        )
    places: dict[str, list[int]] = {}
    for rank, stall in stalls.items():
        places.setdefault(f"{stall.phase} of step {stall.step}, at {stall.place}", []).append(rank)
    where = "; ".join(
        f"{_listed(ranks)} {place}" for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))
    )
    return f"all ranks are stuck in the same step: {where}"


def _listed(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks[:MAX_NAMED]))}{_others(ranks)}"


def _others(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - MAX_NAMED} others" if len(ranks) > MAX_NAMED else ""


def _position(frame: FrameType) -> tuple[str, bool]:
    """Return the innermost line of this package on a stack, and whether it called torch.distributed."""
    frames = traceback.extract_stack(frame)
    ours = [number for number, each in enumerate(frames) if Path(each.filename).is_relative_to(PACKAGE)]
    innermost = ours[-1] if ours else len(frames) - 1
    called = any(Path(each.filename).is_relative_to(COLLECTIVES) for each in frames[innermost:])
    file = Path(frames[innermost].filename)
    short = file.relative_to(PACKAGE.parent) if ours else file
    return f"{short}:{frames[innermost].lineno} in {frames[innermost].name}", called
