"""Gaps between the figures of two systems, and how sure they are."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from contracap.apps.compare.conditions import System, list_remarks, require_same_counts, sample_differences
from contracap.apps.compare.statistics import CONFIDENCE, RESAMPLES, bootstrap_interval, holm, permutation_test
from contracap.evaluation.result import Result

HEADLINES = (
    "acc1",
    "mean_average_precision",
    "text_to_image_recall@5",
    "image_to_text_recall@5",
    "CIDEr",
    "accuracy",
)
UNITS = {"seconds"}  # figures that are no scores: all others are, and are printed times 100


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One figure of both systems, in its own unit; of several runs the mean.

    Attributes:
        figure: `TASK/figure`, or the figure alone.
        a, b, gap: the first system's, the second's, and their difference; None if it is missing in any run.
        gaps: of each pair of runs.
        low, high: of the gap's interval; None for a figure that is not a mean over samples.
        p, p_holm: of the paired test, alone and corrected for all figures that were tested. None in the same case, and
            for several runs, because the test does not know how far runs differ.
        reason: why there is no gap, or no interval.
    """

    figure: str
    a: float | None
    b: float | None
    gap: float | None = None
    gaps: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    reason: str | None = None

    @property
    def task(self) -> str:
        """Task that the figure was measured on; "" in a result of one task."""
        return self.figure.rpartition("/")[0]

    @property
    def name(self) -> str:
        """The figure's name without the task's."""
        return self.figure.rpartition("/")[2]

    @property
    def is_sure(self) -> bool:
        """True if one system is ahead by more than chance: by the corrected test, else, of several runs, which have
        none, by the interval."""
        if self.p_holm is not None:
            return self.p_holm < 1 - CONFIDENCE
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems side by side.

    Attributes:
        names: of the first and the second system.
        rows: of the figures that both have, in their order.
        only: for each system the figures that it alone has a value of.
        runs: of each system.
        samples: that the results rest on.
        seed: of the resamples.
        remarks: what differs in how the two were measured, and what failed in one of them.
    """

    names: tuple[str, str]
    rows: tuple[ComparisonRow, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    runs: int
    samples: int
    seed: int
    remarks: tuple[str, ...] = ()

    @property
    def headlines(self) -> tuple[ComparisonRow, ...]:
        """Rows to draw: of each task the figures its kind is known by, or all of them if none is that; largest gap
        first. Those without a gap are left out, and so are seconds."""
        drawn = [row for row in self.rows if row.gap is not None and row.name not in UNITS]
        headed = {row.task for row in drawn if row.name in HEADLINES}
        drawn = [row for row in drawn if row.name in HEADLINES or row.task not in headed]
        return tuple(sorted(drawn, key=lambda row: -(row.gap or 0.0)))

    def result(self, *, command: str) -> Result:
        """The gaps as a JSON result; what belongs to them stands under `rows`."""
        return Result(
            command=command,
            seed=self.seed,
            samples=self.samples,
            figures={row.figure: row.gap for row in self.rows},
            reasons={row.figure: row.reason for row in self.rows if row.gap is None and row.reason},
            details={
                "names": self.names,
                "runs": self.runs,
                "resamples": RESAMPLES,
                "confidence": CONFIDENCE,
                "rows": [asdict(row) for row in self.rows],
                "remarks": self.remarks,
                "only": dict(zip(self.names, self.only, strict=True)),
            },
        )


def compare(a: Sequence[Result], b: Sequence[Result], names: tuple[str, str] = ("A", "B"), seed: int = 0) -> Comparison:
    """Compare one or more runs of a system with as many of another, the first with the first and so on.

    Args:
        a, b: results of the same tasks on the same samples.
        names: of the two systems.
        seed: of the resamples.

    Raises:
        ValueError: if they have no figure in common, are not equally many, or a figure was measured on other samples,
            or with other numbers of captions, classes or questions: a gap between different tasks tells nothing.
    """
    first, second = (System(" ".join(name.split()), results) for name, results in zip(names, (a, b), strict=True))
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} results of {first.name} and {len(b)} of {second.name}: runs are compared in pairs")
    if first.name == second.name:
        raise ValueError(f"both systems are called {first.name!r}: give them names that differ")
    common = [name for name in first.figures if name in second.figures]
    if not common:
        raise ValueError(
            f"nothing in common: {first.name} has {', '.join(first.figures) or 'nothing'}; {second.name} has "
            f"{', '.join(second.figures) or 'nothing'}"
        )
    tasks = {figure.rpartition("/")[0]: figure for figure in common}
    for task, figure in tasks.items():
        require_same_counts(task, figure, first, second)
    rows = [_row(name, first, second, seed) for name in common]
    return Comparison(
        names=(first.name, second.name),
        rows=tuple(_corrected(rows)),
        only=(_only(first, second), _only(second, first)),
        runs=len(a),
        samples=min(result.samples for result in [*a, *b]),
        seed=seed,
        remarks=tuple(list_remarks(tasks, first, second)),
    )


def _only(system: System, other: System) -> tuple[str, ...]:
    """Return the figures that one system has a value of, in any run, and the other does not have."""
    names = [name for name in system.figures if any(result.figures[name] is not None for result in system.results)]
    return tuple(name for name in names if name not in other.figures)


def _row(name: str, a: System, b: System, seed: int) -> ComparisonRow:
    values_a, values_b = ([result.figures[name] for result in system.results] for system in (a, b))
    mean_a, mean_b = _mean(values_a), _mean(values_b)
    if mean_a is None or mean_b is None:
        missing = (
            f"{system.name}: {result.reasons[name]}"
            for system in (a, b)
            for result in system.results
            if result.figures[name] is None
        )
        return ComparisonRow(figure=name, a=mean_a, b=mean_b, reason=next(missing))
    gaps = tuple(x - y for x, y in zip(values_a, values_b, strict=True) if x is not None and y is not None)
    row = ComparisonRow(figure=name, a=mean_a, b=mean_b, gap=mean_a - mean_b, gaps=gaps)
    differences = sample_differences(name, a, b)
    if differences is None:
        return replace(row, reason="no values of single samples, hence no interval")
    low, high = bootstrap_interval(differences, seed=seed)
    p = permutation_test(differences[0], seed=seed) if len(differences) == 1 else None
    return replace(row, low=low, high=high, p=p)


def _corrected(rows: Sequence[ComparisonRow]) -> Iterator[ComparisonRow]:
    """Yield the rows with p-values corrected for how many of them were tested."""
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    yield from (row if row.p is None else replace(row, p_holm=next(corrected)) for row in rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
