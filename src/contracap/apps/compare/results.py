"""Results as `contracap evaluate --json` and other commands write them, read back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contracap.apps.compare.conditions import COUNTED
from contracap.evaluation.result import OWN_KEYS, PerSample, Result
from contracap.files import read_regular
from contracap.wording import text_problem

LARGEST = 1e100  # no figure; sums and images of larger numbers overflow


def load_result(path: str | Path) -> Result:
    """The result in a file.

    Raises:
        ValueError: naming the file and what is wrong, if it is not a result, or a figure is not the mean of its values.
    """
    try:
        content = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {text_problem(error)}") from None
    try:
        return _result(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def names_of(a: Path, b: Path) -> tuple[str, str]:
    """Name the systems of two files: as each file, or its folder if it is just called results; where that is the same
    for both, by what tells them apart."""
    folders = a.absolute().parent.name, b.absolute().parent.name
    own = [folder if path.stem == "results" else path.stem for path, folder in zip((a, b), folders, strict=True)]
    names = ((own[0], own[1]), folders, (str(a), str(b)))
    return next((pair for pair in names if pair[0] != pair[1]), names[-1])


def _result(content: Any) -> Result:
    if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
        raise ValueError("no `figures` here; give a result, such as contracap evaluate writes with --json")
    if "rows" in content and "resamples" in content:
        raise ValueError("holds the gaps of a comparison, not scores; give one of the results that were compared")
    figures, samples = content["figures"], content.get("samples")
    if not figures:
        raise ValueError("the result has no figures")
    for name, value in figures.items():
        if value is not None and not _is_number(value):
            raise ValueError(f"figure {name} is {value!r:.40}; it must be a number or null")
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise ValueError(f"samples is {samples!r}; it must be how many there were")
    tasks = content.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise ValueError("`tasks` must be an object with an object for each task")
    for facts in (content, *tasks.values()):
        if not isinstance(facts.get("asked", {}), dict):
            raise ValueError("`asked` must be an object with what the task says")
        if wrong := [name for name in COUNTED if name in facts and not isinstance(facts[name], int)]:
            raise ValueError(f"`{wrong[0]}` must be how many there were")
    reasons, per_sample = content.get("reasons", {}), content.get("per_sample", {})
    if not isinstance(reasons, dict) or not isinstance(per_sample, dict):
        raise ValueError("`reasons` and `per_sample` must be objects, with a key for each figure")
    unexplained = {name: "no reason was given" for name, value in figures.items() if value is None}
    return Result(
        command=str(content.get("command", "")),
        seed=content.get("seed"),
        samples=samples,
        figures={name: None if value is None else float(value) for name, value in figures.items()},
        reasons=unexplained | reasons,
        per_sample={name: _values(name, found, figures) for name, found in per_sample.items()},
        details={name: value for name, value in content.items() if name not in OWN_KEYS},
    )


def _values(name: str, found: Any, figures: Mapping[str, Any]) -> PerSample:
    values = found.get("values") if isinstance(found, dict) else None
    if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
        raise ValueError(f"per_sample of {name} must have `values`, a list of numbers")
    figure, mean = figures.get(name), math.fsum(values) / len(values)
    if figure is None or not math.isclose(figure, mean, rel_tol=1e-5, abs_tol=1e-6):
        raise ValueError(f"figure {name} is {figure}, but the mean of its values is {mean}: the file is damaged")
    samples = found.get("samples")
    if not isinstance(samples, str) or not samples:
        raise ValueError(f"per_sample of {name} must have `samples`, a digest of the samples' keys; it is {samples!r}")
    return PerSample(samples=samples, values=[float(value) for value in values])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
