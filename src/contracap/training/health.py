"""The health of a run: spikes of the loss, ranks that stand still, and the signals that ask a run to end."""

import json
import logging
import math
import os
import secrets
import signal
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

WATCHED = ("loss", "gradient_norm")
WARM_UP = 100  # steps, of this process, before anything is called unusual
DECAY = 0.98  # of the usual value and its deviation, per step: they remember about fifty
THRESHOLD = 6.0  # deviations above the usual value
MIN_DEVIATION = 0.01  # share of the usual value: a number that hardly moves may still move
DATA, STEP, CHECKPOINT, EVALUATION, RECORD = (
    "waiting for data",
    "in the step",
    "writing a checkpoint",
    "evaluating",
    "recording",
)
FIRST = 4  # times as long may the first step take: code is compiled, workers start, caches fill
LOOKS = 10  # in the time that a phase may take
MAX_NAMED = 8  # ranks in a message
PACKAGE, COLLECTIVES = Path(__file__).parent.parent, Path(dist.__file__).parent
logger = logging.getLogger(__name__)


class Beat(NamedTuple):
    """What the loop does.

    Attributes:
        step: the one it is at, from 1.
        since: when the phase began, on the monotonic clock.
    """

    step: int
    phase: str
    since: float


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A rank that stands still.

    Attributes:
        seconds: that it has.
        place: the innermost line of this package that it executes.
        waits: whether it is likely that it waits for other ranks.
    """

    step: int
    phase: str
    seconds: float
    place: str
    waits: bool

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step} for {self.seconds:.0f} s, at {self.place}"


class Watchdog:
    """Watches the loop of the thread that makes it, from a thread of its own that takes part in no collective.

    A phase may take `seconds`: the wait for a batch, a step, a checkpoint, one evaluation. The first step may take four
    times that. With several ranks, those that stand still say so through the store that brought them together, and
    rank 0 compares. Nothing is sent before that.
    """

    def __init__(self, seconds: float, process_group: ProcessGroup, *, start: int):
        """Every rank must make one.

        Args:
            seconds: that a phase may take; 0 watches nothing.
            start: steps done before.
        """
        self._seconds, self._process_group = seconds, process_group
        self._first = start + 1
        self._beat = Beat(self._first, DATA, time.monotonic())
        self._watched = threading.get_ident()
        self._name = process_group.broadcast(secrets.token_hex(8))  # no rank reads what one of another run said
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
            self._thread.join(timeout=5)  # it may be talking to a store that is gone

    def enter(self, phase: str) -> None:
        """The loop begins something else."""
        self._beat = Beat(self._beat.step, phase, time.monotonic())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The loop does something between its steps; afterwards it returns to its previous phase."""
        before = self._beat.phase
        self.enter(name)
        yield
        self.enter(before)

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
        if self._stalled is None and now - beat.since > self._seconds * (FIRST if beat.step == self._first else 1):
            frame = sys._current_frames()[self._watched]
            place, called = _position(frame)
            waits = called or beat.phase == STEP  # where C++ does
            stall = Stall(step=beat.step, phase=beat.phase, seconds=now - beat.since, place=place, waits=waits)
            stack = "".join(traceback.format_stack(frame))
            logger.warning("rank %d stands still: %s\n%s", rank, stall, stack.rstrip())
            self._stalled = beat
            self._publish(stall)
            # The others need not have come to their limit at the same moment.
            self._compare_at = (
                now + 2 * self._seconds / LOOKS if rank == 0 and self._process_group.world_size > 1 else None
            )
        if self._compare_at is not None and now >= self._compare_at:
            self._compare_at = None
            self._compare()

    def _publish(self, stall: Stall | None) -> None:
        """Tell rank 0, or that it is over."""
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
        logger.warning("%s", verdict(stalls, self._process_group.world_size))

    def _connected(self) -> dist.Store:
        """A connection of this thread's own: the process group's may be what the loop waits on."""
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


def verdict(stalls: Mapping[int, Stall], count: int) -> str:
    """Name the ranks that the others wait for: first those that have done fewer steps, then those in a phase of their
    own, then those that have not reported.

    Args:
        count: of all ranks.
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
    return f"all ranks stand still, and none is behind: {where}"


def _listed(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks[:MAX_NAMED]))}{_others(ranks)}"


def _others(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - MAX_NAMED} others" if len(ranks) > MAX_NAMED else ""


def _position(frame: FrameType) -> tuple[str, bool]:
    """The innermost line of this package on a stack, and whether it called torch.distributed."""
    frames = traceback.extract_stack(frame)
    ours = [number for number, each in enumerate(frames) if Path(each.filename).is_relative_to(PACKAGE)]
    innermost = ours[-1] if ours else len(frames) - 1
    called = any(Path(each.filename).is_relative_to(COLLECTIVES) for each in frames[innermost:])
    file = Path(frames[innermost].filename)
    short = file.relative_to(PACKAGE.parent) if ours else file
    return f"{short}:{frames[innermost].lineno} in {frames[innermost].name}", called


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interrupted(Exception):
    """A run that ended because it was asked to, after a checkpoint from which it can continue.

    Attributes:
        exit_status: the sysexits.h code of a failure that another try gets over; a scheduler can requeue on it.
    """

    exit_status = 75


class ShutdownRequested(BaseException):
    """Raised where a run that is asked to end waits for something. It is no `Exception`, so that no handler on the way
    takes it for a failure."""


class ShutdownSignal:
    """Set when the process is asked to end. It then ends at once, or after its step and a checkpoint."""

    def __init__(self) -> None:
        self.received = False
        self._at_once = self._raised = False

    @contextmanager
    def at_once(self, holds: bool = True) -> Iterator[None]:
        """A context in which the signal raises at once; with `holds` false, one in which it only is noted.

        Raises: ShutdownRequested: if the signal has come, also before the context was entered, and if a library has
            made another error of it on the way, as torch does while it reads a checkpoint.
        """
        before = self._at_once, self._raised
        self._at_once, self._raised = holds, False
        try:
            self._check()
            yield
        except Exception:
            if self._raised:
                raise ShutdownRequested from None
            raise
        finally:
            self._at_once, self._raised = before

    @property
    def ends_at_once(self) -> bool:
        """Whether the signal would raise now."""
        return self._at_once

    def note(self) -> None:
        """The signal has come."""
        self.received = True
        self._check()

    def _check(self) -> None:
        if self.received and self._at_once:
            self._raised = True
            raise ShutdownRequested


@contextmanager
def shutdown_signal() -> Iterator[ShutdownSignal]:
    """A context in which SIGTERM, SIGUSR1 and the first Ctrl-C are noted, so that a run can finish its step and write a
    checkpoint. The next Ctrl-C does what it did before.

    Signals go to the main thread; in another thread the context changes nothing.
    """
    shutdown = ShutdownSignal()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            earlier = before[number]
            if shutdown.received and callable(earlier):
                earlier(number, frame)
                return
            if not shutdown.ends_at_once and os.environ.get("RANK", "0") == "0":  # of the ranks of torchrun, one
                # Not print: the signal may have come within another write to the same stream.
                os.write(2, b"\nending after a checkpoint; Ctrl-C again ends at once\n")
        shutdown.note()

    if threading.current_thread() is not threading.main_thread():
        yield shutdown
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield shutdown
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def exit_on_signal(advice: str = "resume=true continues from the last checkpoint") -> Iterator[None]:
    """A context in which Ctrl-C and SIGTERM end the process without a traceback, unless `shutdown_signal` notes them.
    What is on the disk is whole at any moment. `advice`: how to continue.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\ncontracap: error: interrupted; {advice}\n".encode())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One step that was not as usual.

    Attributes:
        numbers: of the step, as far as they are finite.
        usual: what the watched numbers usually are.
        keys: of the step's samples.
    """

    step: int
    reason: str
    numbers: Mapping[str, float]
    usual: Mapping[str, float]
    keys: Sequence[str]


class Usual:
    """The mean of a number over the last steps and its deviation from it, weighted exponentially.

    A value beyond the threshold counts as one that is just there: a single one moves little, a level that stays is
    usual after about ten steps.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self._variance = 0.0
        self._count = 0

    def exceeded_by(self, value: float) -> bool:
        """Whether the value is a spike; either way it counts from now on."""
        deviation = max(math.sqrt(self._variance), MIN_DEVIATION * abs(self.mean))
        warm = self._count >= WARM_UP
        highest = self.mean + THRESHOLD * deviation if warm else math.inf
        self._count += 1
        weight = max(1 - DECAY, 1 / self._count)
        difference = min(value, highest) - self.mean
        self.mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        return value > highest


class Spikes:
    """Finds spikes. Ranks that are shown the same numbers find the same ones."""

    def __init__(self) -> None:
        self._usual = {name: Usual() for name in WATCHED}

    def look(self, step: int, numbers: Mapping[str, float], keys: Sequence[str]) -> Spike | None:
        """The step's spike, if it is one; all its numbers are finite."""
        usual = {name: self._usual[name].mean for name in WATCHED}
        high = [name for name in WATCHED if self._usual[name].exceeded_by(numbers[name])]
        if not high:
            return None
        reason = ", ".join(f"{name} {numbers[name]:.4g}, usually {usual[name]:.4g}" for name in high)
        return Spike(step=step, reason=reason, numbers=numbers, usual=usual, keys=keys)

    def not_finite(self, step: int, reason: str, keys: Sequence[str]) -> Spike:
        """A step with numbers that are NaN or infinite."""
        usual = {name: usual.mean for name, usual in self._usual.items()}
        return Spike(step=step, reason=reason, numbers={}, usual=usual, keys=keys)
