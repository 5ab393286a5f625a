"""What two systems reach, figure by figure, and how sure the gap between them is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Float64

from contracap.apps.compare.statistics import CONFIDENCE, RESAMPLES, bootstrap_interval, holm, permutation_test
from contracap.evaluation.published import main_name
from contracap.evaluation.result import Result

HEADLINES = (
    "acc1",
    "mean_average_precision",
    "text_to_image_recall@5",
    "image_to_text_recall@5",
    "CIDEr",
    "accuracy",
)
MEASURED_BY = {"tokenizer": "the tokenizer", "clipscore_model": "the model behind CLIPScore"}
ASKED_BY = {  # keys of a task that change its figures
    "data": "the data",
    "classes": "the set of classes",
    "templates": "the set of templates",
    "answers": "the list of answers",
    "prompt": "the prompt",
    "strategy": "the strategy",
    "settings": "the strategy's settings",
}
COUNTED = ("captions", "classes", "questions")  # of a task: with another number of them its figures are others
UNITS = {"seconds"}  # figures that are no scores: all others are, and are printed times 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of both systems, in its own unit; of several runs the mean.

    Attributes:
        figure: `TASK/figure`, or the figure alone.
        a, b, gap: the first system's, the second's, and their difference; None if it is missing in any run.
        gaps: of each pair of runs.
        low, high: of the gap's interval; None for a figure that is not a mean over samples.
        p, p_holm: of the paired test, alone and corrected for all figures that were tested; None likewise, and where
            there are several runs: the test knows nothing of how far runs differ.
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
        """What the figure was measured on; "" in a result of one task."""
        return self.figure.rpartition("/")[0]

    @property
    def name(self) -> str:
        """The figure's name without the task's."""
        return self.figure.rpartition("/")[2]

    @property
    def is_sure(self) -> bool:
        """Whether one system is ahead by more than chance: by the corrected test, else, of several runs, which have
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
    rows: tuple[Row, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    runs: int
    samples: int
    seed: int
    remarks: tuple[str, ...] = ()

    @property
    def headlines(self) -> tuple[Row, ...]:
        """What is drawn: of each task the figures its kind is known by, or all of them if none is that; largest gap
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
    """Compares one or more runs of a system with as many of another, the first with the first and so on.

    Args:
        a, b: results of the same tasks on the same samples.
        names: of the two systems.
        seed: of the resamples.

    Raises:
        ValueError: if they have no figure in common, are not equally many, or a figure was measured on other samples,
            or with other numbers of captions, classes or questions: a gap between different tasks tells nothing.
    """
    names = (" ".join(names[0].split()), " ".join(names[1].split()))
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} results of {names[0]} and {len(b)} of {names[1]}: runs are compared in pairs")
    if names[0] == names[1]:
        raise ValueError(f"both systems are called {names[0]!r}: give them names that differ")
    of_a, of_b = _common(a), _common(b)
    common = [name for name in of_a if name in of_b]
    if not common:
        raise ValueError(
            f"nothing in common: {names[0]} has {', '.join(of_a) or 'nothing'}; {names[1]} has "
            f"{', '.join(of_b) or 'nothing'}"
        )
    tasks = {figure.rpartition("/")[0]: figure for figure in common}
    for task, figure in tasks.items():
        _require_same_counts(task, figure, a, b, names)
    rows = [_row(name, a, b, names, seed) for name in common]
    return Comparison(
        names=names,
        rows=tuple(_corrected(rows)),
        only=(_only(a, b), _only(b, a)),
        runs=len(a),
        samples=min(result.samples for result in [*a, *b]),
        seed=seed,
        remarks=(*_remarks(tasks, a, b, names), *_failures(a, b, names)),
    )


def _common(results: Sequence[Result]) -> list[str]:
    """The figures that all of these have."""
    return [name for name in results[0].figures if all(name in result.figures for result in results)]


def _only(own: Sequence[Result], other: Sequence[Result]) -> tuple[str, ...]:
    """The figures that one system has a value of, in any run, and the other does not have."""
    names = [name for name in _common(own) if any(result.figures[name] is not None for result in own)]
    return tuple(name for name in names if name not in _common(other))


def _row(name: str, a: Sequence[Result], b: Sequence[Result], names: tuple[str, str], seed: int) -> Row:
    values_a, values_b = ([result.figures[name] for result in results] for results in (a, b))
    mean_a, mean_b = _mean(values_a), _mean(values_b)
    if mean_a is None or mean_b is None:
        missing = (
            f"{system}: {result.reasons[name]}"
            for system, results in zip(names, (a, b), strict=True)
            for result in results
            if result.figures[name] is None
        )
        return Row(figure=name, a=mean_a, b=mean_b, reason=next(missing))
    gaps = tuple(x - y for x, y in zip(values_a, values_b, strict=True) if x is not None and y is not None)
    row = Row(figure=name, a=mean_a, b=mean_b, gap=mean_a - mean_b, gaps=gaps)
    differences = _differences(name, a, b, names)
    if differences is None:
        return replace(row, reason="no values of single samples, hence no interval")
    low, high = bootstrap_interval(differences, seed=seed)
    p = permutation_test(differences[0], seed=seed) if len(differences) == 1 else None
    return replace(row, low=low, high=high, p=p)


def _differences(
    name: str, a: Sequence[Result], b: Sequence[Result], names: tuple[str, str]
) -> Float64[np.ndarray, "run sample"] | None:
    """Differences of each pair of runs at each sample; None if a run has no values of single samples."""
    results = [(system, result) for system, side in zip(names, (a, b), strict=True) for result in side]
    found = [(system, result.per_sample[name]) for system, result in results if name in result.per_sample]
    for system, values in found:
        if (values.samples, len(values.values)) != (found[0][1].samples, len(found[0][1].values)):
            raise ValueError(
                f"{name} was measured on other samples: {len(found[0][1].values)} of {found[0][0]}, "
                f"{len(values.values)} of {system}, with other keys or in another order; evaluate both on the same data"
            )
    if len(found) < len(results):
        # All that can be told is how many samples there were and a digest of their keys, if that.
        counts = {count for _, result in results if isinstance(count := _facts(result, name).get("samples"), int)}
        if len(counts) > 1:
            raise ValueError(
                f"{name} was measured on other samples: the results rest on {' and '.join(map(str, sorted(counts)))}; "
                "evaluate both on the same data"
            )
        if len({str(keys) for _, result in results if (keys := _facts(result, name).get("keys_digest"))}) > 1:
            raise ValueError(
                f"{name} was measured on other samples, with other keys or in another order; evaluate both on the "
                "same data"
            )
        return None
    values_a, values_b = (
        np.array([result.per_sample[name].values for result in side], dtype=np.float64) for side in (a, b)
    )
    return values_a - values_b


def _facts(result: Result, figure: str) -> Mapping[str, Any]:
    """What a result tells of the task that a figure is of: how many samples there were, and what else."""
    task = figure.rpartition("/")[0]
    return result.details.get("tasks", {}).get(task, {}) if task else {"samples": result.samples, **result.details}


def _require_same_counts(
    task: str, figure: str, a: Sequence[Result], b: Sequence[Result], names: tuple[str, str]
) -> None:
    """Raises: ValueError: if a task was measured with other numbers of something."""
    where = f"{task} was" if task else "they were"
    for what in COUNTED:
        of_a, of_b = (
            sorted({facts[what] for result in results if what in (facts := _facts(result, figure))})
            for results in (a, b)
        )
        if len({*of_a, *of_b}) > 1:
            raise ValueError(
                f"{where} measured on other samples: {' and '.join(map(str, of_a))} {what} of {names[0]}, "
                f"{' and '.join(map(str, of_b))} of {names[1]}; evaluate both on the same data"
            )


def _remarks(
    tasks: Mapping[str, str], a: Sequence[Result], b: Sequence[Result], names: tuple[str, str]
) -> Iterator[str]:
    """What differs in how the two systems were measured, a sentence each.

    Args:
        tasks: by name, with one of its figures.
    """
    for task, figure in tasks.items():
        where = f"{task}: " if task else ""
        ways_a, ways_b = ([_ways(_facts(result, figure)) for result in results] for results in (a, b))
        for what in (*MEASURED_BY.values(), *ASKED_BY.values()):
            of_a, of_b = (sorted({found[what] for found in ways if what in found}) for ways in (ways_a, ways_b))
            if of_a and of_b and of_a != of_b:
                yield (
                    f"{where}{what} of {names[0]} is {' and '.join(of_a)}, that of {names[1]} {' and '.join(of_b)}: "
                    "part of the gap may come of that"
                )
        if any(_facts(result, figure).get("asked", {}).get("clipscore") == "self" for result in [*a, *b]):
            yield f"{where}a model's CLIPScore of its own captions compares the judges as much as the captions"


def _ways(facts: Mapping[str, Any]) -> dict[str, str]:
    """By what a task was measured, in words; of files and folders the names alone, wherever they lie;
    of published classes the main name."""
    found = {what: str(facts[fact]) for fact, what in MEASURED_BY.items() if fact in facts}
    if "asked" in facts:
        for key, what in ASKED_BY.items():
            value = facts["asked"].get(key, "the default")
            parts = value if isinstance(value, list) else [value]
            found[what] = " ".join(_named(key, str(part)) for part in parts)
    return found


def _named(key: str, text: str) -> str:
    if key in ("prompt", "settings"):
        return text
    # VTAB has other classes than the set of the same name, but not other templates.
    return (main_name(text) if key == "classes" else None) or PurePath(text).name


def _failures(a: Sequence[Result], b: Sequence[Result], names: tuple[str, str]) -> Iterator[str]:
    """Why a task of the other system failed in one, a sentence each."""
    for name, results in zip(names, (a, b), strict=True):
        other = {f"{figure.rpartition('/')[0]}/" for result in (b if results is a else a) for figure in result.figures}
        reasons = {figure: reason for result in results for figure, reason in result.reasons.items()}
        yield from (f"{figure} of {name}: {reason}" for figure, reason in reasons.items() if f"{figure}/" in other)


def _corrected(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows with p-values corrected for how many of them were tested."""
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    yield from (row if row.p is None else replace(row, p_holm=next(corrected)) for row in rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
