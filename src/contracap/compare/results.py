"""Results as `contracap evaluate --json` and other verbs write them, read back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contracap.evaluation.result import PerSample, Result

OWN = {"command", "versions", "seed", "samples", "figures", "reasons", "per_sample"}


def load_result(path: str | Path) -> Result:
    """The result in a file.

    Raises:
        ValueError: naming the file and what is wrong, if it is no result, or a figure is not the mean of its values.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        return _result(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def names_of(a: Path, b: Path) -> tuple[str, str]:
    """What to call the systems of two files: as the files, or as their folders if that tells them apart better."""
    if a.stem != b.stem and "results" not in (a.stem, b.stem):
        return a.stem, b.stem
    folders = a.absolute().parent.name, b.absolute().parent.name
    return folders if folders[0] != folders[1] else (str(a), str(b))


def _result(content: Any) -> Result:
    if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
        raise ValueError("no `figures` here; give a result, such as contracap evaluate writes with --json")
    figures, samples = content["figures"], content.get("samples")
    if not figures:
        raise ValueError("the result has no figures")
    for name, value in figures.items():
        if value is not None and not _is_number(value):
            raise ValueError(f"figure {name} is {value!r}; it must be a number or null")
    if not isinstance(samples, int):
        raise ValueError(f"samples is {samples!r}; it must be how many there were")
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
        details={name: value for name, value in content.items() if name not in OWN},
    )


def _values(name: str, found: Any, figures: Mapping[str, Any]) -> PerSample:
    values = found.get("values") if isinstance(found, dict) else None
    if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
        raise ValueError(f"per_sample of {name} must have `values`, a list of numbers")
    figure, mean = figures.get(name), math.fsum(values) / len(values)
    if figure is None or not math.isclose(figure, mean, rel_tol=1e-5, abs_tol=1e-6):
        raise ValueError(f"figure {name} is {figure}, but the mean of its values is {mean}: the file is damaged")
    return PerSample(samples=str(found.get("samples")), values=[float(value) for value in values])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
