"""The harness of all benchmarks: outputs are checked, then runs of both sides alternate; medians and quartiles."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import MissingPeerError

Work = Callable[[], object]
Numbers = Mapping[str, float | Tensor]

MIN_ROUNDS = 7
MIN_MIB = 1.0  # memory below this counts as this much in a ratio


class UnequalError(ValueError):
    """The outputs of both sides differ, so their times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of the command line.

    Attributes:
        rounds: timed runs of each side.
        small: use a small model and few samples, to try out on any machine what is meant for a GPU.
    """

    device: torch.device = torch.device("cpu")
    rounds: int = MIN_ROUNDS
    seed: int = 0
    small: bool = False

    def size(self, name: str) -> str:
        """Return the size of the model that stands for a released one."""
        return "flickr8k" if self.small else name

    def count(self, number: int, *, small: int) -> int:
        """Return a number of samples or the like."""
        return small if self.small else number

    def clock(self) -> float:
        """Seconds, read after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark.

    Attributes:
        work: what was done.
        unit: of `ours` and `peer`.
        ours: median over the rounds.
        peer: the same for the peer; None if there is none.
        ratio: how many times better than the peer, the median of the rounds' ratios; above 1 is better.
        quartiles: lower and upper quartile of the rounds' ratios.
        note: which outputs were compared and how far they agree, or what else explains the figure.
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
    """One benchmark of `python -m benchmarks NAME`.

    Attributes:
        rows: functions that measure a row, by its name on the command line.
        samples: number of samples that were measured.
        cuda: it can run on a GPU.
        cuda_rows: rows that need a GPU.
        machine: further facts of the machine for the result file.
    """

    rows: dict[str, Callable[[Run], Row]]
    samples: Callable[[], int]
    cuda: bool = False
    cuda_rows: dict[str, Callable[[Run], Row]] = field(default_factory=dict)
    machine: Callable[[Run], Mapping[str, Any]] = lambda run: {}


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, and their notes below."""
    cells = [("work", "ours", "peer", "unit", "ratio", "quartiles")]
    for row in rows:
        quartiles = "{:.2f} to {:.2f}".format(*row.quartiles) if row.quartiles else "-"
        ours, peer, ratio = (
            "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
            for value in (row.ours, row.peer, row.ratio)
        )
        cells.append((row.work, ours, peer, row.unit, ratio, quartiles))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    notes = [f"{row.work}: {text}" for row in rows for text in (row.note, row.reason) if text]
    return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def compare(
    work: str,
    *,
    run: Run,
    ours: Work,
    checked_peer: Callable[[], tuple[Work, str]],
    items: int,
    unit: str,
    clock: Callable[[], float] | None = None,
    share: float = 1.0,
) -> Row:
    """Time ours and the peer on the same work, in `items` a second.

    Each runs once untimed, then they alternate, and the ratio of each round is that of two neighbouring runs. If the
    peer is not installed, only ours is timed.

    Args:
        checked_peer: compares the outputs of both sides; returns the peer's work and says how far they agree.
        clock: by default wall time. `time.process_time` counts what all threads of this process compute.
        share: the share of the items in the peer's work, if all of them would take hours and each costs it the same.

    Raises:
        UnequalError: from `checked_peer`, if the outputs differ. Nothing is timed then.
    """
    clock = clock or run.clock
    try:
        peer, note = checked_peer()
    except MissingPeerError as error:
        (seconds,) = alternate(ours, rounds=run.rounds, clock=clock)
        return Row(work=work, unit=unit, ours=items / statistics.median(seconds), reason=str(error))
    seconds, peer_seconds = alternate(ours, peer, rounds=run.rounds, clock=clock)
    peer_seconds = [second / share for second in peer_seconds]
    lower, ratio, upper = statistics.quantiles(map(truediv, peer_seconds, seconds), method="inclusive")
    return Row(
        work=work,
        unit=unit,
        ours=items / statistics.median(seconds),
        peer=items / statistics.median(peer_seconds),
        ratio=ratio,
        quartiles=(lower, upper),
        note=note,
    )


def alternate(*works: Work, rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds that each work takes in each round. Before the first round each runs once untimed."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, seconds, strict=True):
            begin = clock()
            work()
            taken.append(clock() - begin)
    return seconds


def compare_memory(
    work: str,
    *,
    ours: Callable[[], tuple[float, Numbers]],
    peer: Callable[[], tuple[float, Numbers]],
    tolerance: float,
    note: str = "",
) -> Row:
    """Compare the memory of both sides, measured once. Each returns MiB and the numbers that must be equal.

    Raises:
        UnequalError: if the numbers differ.
    """
    mib, numbers = ours()
    row = Row(work=work, unit="MiB", ours=mib, note="; ".join(filter(None, [MEASURED_ONCE, note])))
    try:
        peer_mib, peer_numbers = peer()
    except MissingPeerError as error:
        return replace(row, reason=str(error))
    except torch.OutOfMemoryError:
        return replace(row, reason="the peer's work does not fit into the memory of the device")
    note = f"{require_equal(numbers, peer_numbers, tolerance=tolerance)}; {row.note}"
    return replace(row, peer=peer_mib, ratio=peer_mib / max(mib, MIN_MIB), note=note)


MEASURED_ONCE = "peak memory of a fresh process each, measured once"


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process: the peak of resident memory never falls again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def require_equal(ours: Numbers, peer: Numbers, *, tolerance: float) -> str:
    """Say how far the peer's numbers and ours of the same names agree, relative to the peer's.

    Raises:
        UnequalError: if a difference is above `tolerance`, or a number is NaN.
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


def data_path(name: str) -> Path:
    """A folder or file in the data folder: CONTRACAP_DATA, else ../shared/data.

    Raises:
        FileNotFoundError: if it is not there.
    """
    path = Path(os.environ.get("CONTRACAP_DATA") or "../shared/data") / name
    if not path.exists():
        raise FileNotFoundError(f"no {path}: set CONTRACAP_DATA to a folder with {name} in it")
    return path
