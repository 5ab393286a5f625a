"""Conditions under which two systems were measured: refuse what cannot be compared, and remark what differs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Float64

from contracap.evaluation.class_names import main_name
from contracap.evaluation.result import Result

MEASURED_BY = {"tokenizer": "the tokenizer", "clipscore_model": "the model of CLIPScore"}
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


@dataclass(frozen=True)
class System:
    """A system under comparison, with the results of its runs."""

    name: str
    results: Sequence[Result]

    @property
    def figures(self) -> list[str]:
        """Names of the figures that all runs have."""
        first, *others = self.results
        return [name for name in first.figures if all(name in result.figures for result in others)]

    def facts(self, figure: str) -> list[Mapping[str, Any]]:
        """Return what each result tells of the task that a figure is of: how many samples there were, and what else."""
        task = figure.rpartition("/")[0]
        if not task:
            return [{"samples": result.samples, **result.details} for result in self.results]
        return [result.details.get("tasks", {}).get(task, {}) for result in self.results]


def sample_differences(figure: str, a: System, b: System) -> Float64[np.ndarray, "run sample"] | None:
    """Return the differences of each pair of runs at each sample; None if a run has no values of single samples.

    Raises: ValueError: if a figure was measured on other samples.
    """
    results = [(system, result) for system in (a, b) for result in system.results]
    found = [(system, result.per_sample[figure]) for system, result in results if figure in result.per_sample]
    for system, values in found:
        if (values.samples, len(values.values)) != (found[0][1].samples, len(found[0][1].values)):
            raise ValueError(
                f"{figure} was measured on other samples: {len(found[0][1].values)} of {found[0][0].name}, "
                f"{len(values.values)} of {system.name}, with other keys or in another order; evaluate both on the "
                "same data"
            )
    if len(found) < len(results):
        _require_same_samples(figure, [*a.facts(figure), *b.facts(figure)])
        return None
    values_a, values_b = (
        np.array([result.per_sample[figure].values for result in system.results], dtype=np.float64) for system in (a, b)
    )
    return values_a - values_b


def _require_same_samples(figure: str, facts: Sequence[Mapping[str, Any]]) -> None:
    """Compare the number of samples and the digest of their keys, where results without single values tell them.

    Raises: ValueError: if they differ.
    """
    counts = {count for fact in facts if isinstance(count := fact.get("samples"), int)}
    if len(counts) > 1:
        raise ValueError(
            f"{figure} was measured on other samples: the results rest on {' and '.join(map(str, sorted(counts)))}; "
            "evaluate both on the same data"
        )
    if len({str(keys) for fact in facts if (keys := fact.get("keys_digest"))}) > 1:
        raise ValueError(
            f"{figure} was measured on other samples, with other keys or in another order; evaluate both on the same "
            "data"
        )


def require_same_counts(task: str, figure: str, a: System, b: System) -> None:
    """Raises: ValueError: if a task was measured with other numbers of something."""
    where = f"{task} was" if task else "they were"
    for what in COUNTED:
        of_a, of_b = (sorted({facts[what] for facts in system.facts(figure) if what in facts}) for system in (a, b))
        if len({*of_a, *of_b}) > 1:
            raise ValueError(
                f"{where} measured on other samples: {' and '.join(map(str, of_a))} {what} of {a.name}, "
                f"{' and '.join(map(str, of_b))} of {b.name}; evaluate both on the same data"
            )


def list_remarks(tasks: Mapping[str, str], a: System, b: System) -> Iterator[str]:
    """Yield what differs in how the two systems were measured, then why a task failed in one, a sentence each.

    Args:
        tasks: by name, with one of its figures.
    """
    for task, figure in tasks.items():
        where = f"{task}: " if task else ""
        ways_a, ways_b = ([_ways(facts) for facts in system.facts(figure)] for system in (a, b))
        for what in (*MEASURED_BY.values(), *ASKED_BY.values()):
            of_a, of_b = (sorted({found[what] for found in ways if what in found}) for ways in (ways_a, ways_b))
            if of_a and of_b and of_a != of_b:
                yield (
                    f"{where}{what} ({' and '.join(of_a)} for {a.name}, {' and '.join(of_b)} for {b.name}) may cause "
                    "part of the gap"
                )
        if any(facts.get("asked", {}).get("clipscore") == "self" for facts in [*a.facts(figure), *b.facts(figure)]):
            yield f"{where}a model's CLIPScore of its own captions compares the judges as much as the captions"
    for system, other in ((a, b), (b, a)):
        tried = {figure.rpartition("/")[0] for result in other.results for figure in result.figures}
        reasons = {figure: reason for result in system.results for figure, reason in result.reasons.items()}
        yield from (f"{task} of {system.name}: {reason}" for task, reason in reasons.items() if task in tried)


def _ways(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return by what a task was measured, in words. Files and folders have their last name, wherever they lie."""
    found = {what: str(facts[fact]) for fact, what in MEASURED_BY.items() if fact in facts}
    if "asked" in facts:
        for key, what in ASKED_BY.items():
            value = facts["asked"].get(key, "the default")
            parts = value if isinstance(value, list) else [value]
            found[what] = " ".join(_short_name(key, str(part)) for part in parts)
    return found


def _short_name(key: str, text: str) -> str:
    if key in ("prompt", "settings"):
        return text
    # VTAB has other classes than the set of the same name, but not other templates.
    return (main_name(text) if key == "classes" else None) or PurePath(text).name
