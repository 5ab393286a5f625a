"""Two ways of doing the same work, timed in turns: what every benchmark is made of."""

import importlib
import importlib.util
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.machinery import ModuleSpec
from operator import truediv
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contracap.config import require_count
from contracap.evaluation.result import Result

Work = Callable[[], object]
LEAST_ROUNDS = 7  # fewer have no quartiles worth reading


class UnequalError(ValueError):
    """Ours and the peer's output differ, so that their times say nothing."""


class NoPeerError(ImportError):
    """The peer is not installed; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark.

    Attributes:
        work: what was done.
        unit: of `ours` and `peer`.
        ours: the median over the rounds.
        peer: likewise of the peer; None if there is none.
        ratio: how many times better than the peer, the median of the rounds' ratios; above 1 is better.
        quartiles: the lower and the upper one of the rounds' ratios.
        note: what was compared before the clock ran and how far it agreed, or what else explains the figure.
        reason: why there is no peer.
    """

    work: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    note: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Rows that were measured together; `machine` is `this_machine()` before they were."""

    rows: Sequence[Row]
    samples: int
    seed: int
    machine: Mapping[str, Any]

    def result(self, command: str) -> Result:
        """The file of the benchmark: the ratios are its figures, the whole rows stand beside them."""
        return Result(
            command=command,
            seed=self.seed,
            samples=self.samples,
            figures={row.work: row.ratio for row in self.rows},
            reasons={row.work: row.reason for row in self.rows if row.reason},
            details={"rows": [asdict(row) for row in self.rows], "machine": dict(self.machine)},
        )

    def table(self) -> str:
        """The rows for a terminal, and below them their notes."""
        cells = [("work", "ours", "peer", "unit", "ratio", "quartiles")]
        for row in self.rows:
            quartiles = "{:.2f} to {:.2f}".format(*row.quartiles) if row.quartiles else "-"
            cells.append((row.work, _number(row.ours), _number(row.peer), row.unit, _number(row.ratio), quartiles))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        notes = [f"{row.work}: {text}" for row in self.rows for text in (row.note, row.reason) if text]
        return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def compare(
    work: str,
    *,
    ours: Work,
    checked_peer: Callable[[], tuple[Work, str]],
    items: int,
    unit: str,
    rounds: int = LEAST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    share: float = 1.0,
) -> Row:
    """How many `items` a second we do, and the peer, on the same work.

    Each does the work once unmeasured, then they take turns; a round's ratio is that of two neighbours in time. Where
    the peer is not installed, ours is timed alone.

    Args:
        checked_peer: compares the outputs of both, before any clock runs; returns the peer's work, and says how far
            they agree and with which tolerance.
        clock: in seconds; `time.process_time` counts what all threads of this process compute, and nobody else's work.
        share: of the items that the peer's work holds, where all of them would take hours and each costs it the same.

    Raises:
        UnequalError: by `checked_peer`, if the outputs differ.
        ValueError: if there are too few rounds.
    """
    try:
        peer, note = checked_peer()
    except NoPeerError as error:
        (seconds,) = in_turns(ours, rounds=rounds, clock=clock)
        return timed_row(work, seconds, items=items, unit=unit, reason=str(error))
    seconds, peer_seconds = in_turns(ours, peer, rounds=rounds, clock=clock)
    return timed_row(work, seconds, [second / share for second in peer_seconds], items=items, unit=unit, note=note)


def timed_row(
    work: str,
    seconds: Sequence[float],
    peer_seconds: Sequence[float] | None = None,
    *,
    items: int,
    unit: str,
    note: str = "",
    reason: str = "",
) -> Row:
    """The row of what `in_turns` measured: of ours and, if there is one, of the peer in the same rounds."""
    row = Row(work=work, unit=unit, ours=items / statistics.median(seconds), note=note, reason=reason)
    if peer_seconds is None:
        return row
    lower, ratio, upper = statistics.quantiles(map(truediv, peer_seconds, seconds), method="inclusive")
    return replace(row, peer=items / statistics.median(peer_seconds), ratio=ratio, quartiles=(lower, upper))


def require_rounds(rounds: int) -> None:
    """Raises: ValueError: if there are too few rounds, or too many."""
    require_count("rounds", rounds, LEAST_ROUNDS, "timed runs of each side", most=10_000)


def in_turns(*works: Work, rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """The seconds that each of `works` took in each round; before the first round each runs once unmeasured.

    Raises:
        ValueError: if there are too few rounds.
    """
    require_rounds(rounds)
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, seconds, strict=True):
            begin = clock()
            work()
            taken.append(clock() - begin)
    return seconds


def require_equal(ours: Mapping[str, float | Tensor], peer: Mapping[str, float | Tensor], *, tolerance: float) -> str:
    """Says how far the peer's numbers and ours of the same names agree, relative to the peer's.

    Raises:
        UnequalError: if one is further off than `tolerance`, or not a number.
    """
    largest = 0.0
    for name, value in peer.items():
        found, expected = float(ours[name]), float(value)
        difference = abs(found / expected - 1)
        if not difference <= tolerance:  # NaN is not equal either
            raise UnequalError(
                f"{name} is {found:.6g}, the peer's {expected:.6g}: {difference:.1e} apart, allowed is {tolerance:.0e}"
            )
        largest = max(largest, difference)
    return f"{', '.join(peer)} differ by {largest:.1e} at most (allowed: {tolerance:.0e})"


def peer_module(name: str, package: str = "open_clip_torch") -> ModuleType:
    """A module of the peer, found by its name: the package does not depend on it.

    Args:
        package: what is to be installed to have it.

    Raises:
        NoPeerError: if it cannot be imported.
    """
    try:
        with _stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
        raise NoPeerError(f"{name} cannot be imported ({error}): pip install {package}") from error


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_mib() -> float:
    """The most memory, in MiB, that has been resident in this process.

    Raises:
        FileNotFoundError: outside of Linux.
    """
    return _resident_mib("VmHWM")  # not getrusage, whose peak a child process inherits from its parent


def peak_growth(work: Work, device: torch.device) -> float:
    """The MiB that `work` adds at its peak to what is held before it. On a CPU of resident memory, whose peak never
    falls: only a work that goes beyond all before it in this process is measured.

    Raises:
        FileNotFoundError: outside of Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    resident = _resident_mib("VmRSS")
    work()
    return peak_mib() - resident


def matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int = 2048, repeats: int = 7) -> float:
    """Operations a second of a product of two square matrices, the median of `repeats`."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = 100 if device.type == "cuda" else 1  # one takes a GPU a few hundredths of a millisecond
    (seconds,) = in_turns(
        lambda: [left @ right for _ in range(calls)], rounds=repeats, clock=partial(device_clock, device)
    )
    return calls * 2 * side**3 / statistics.median(seconds)


def device_clock(device: torch.device) -> float:
    """Seconds, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def this_machine() -> dict[str, Any]:
    """What figures of speed depend on besides versions; `load` is that of the last 1, 5 and 15 minutes."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules in place of two that open_clip imports and nothing here calls, where the real ones fail."""
    absent = []
    if torch.version.cuda is None:  # CUDA operators of torchvision, which this torch cannot register
        absent.append("torchvision._meta_registrations")
    if importlib.util.find_spec("pandas") is None:  # reads its lists of pictures in CSV files
        absent.append("pandas")
    added = [name for name in absent if name not in sys.modules]
    # with a spec, which torch's compiler asks of all modules
    sys.modules.update({name: importlib.util.module_from_spec(ModuleSpec(name, None)) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
