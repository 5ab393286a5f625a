"""A sweep over the weights between two models: how much of one skill is kept where how much of another is gained."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contracap.apps.figures import FIRST, NEITHER, SECOND, draw, new_figure
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.result import Result, list_versions
from contracap.evaluation.suite import measure_tasks
from contracap.files import write_text
from contracap.pretrained.mixing import mix_weights, require_same_model
from contracap.pretrained.models import build_model
from contracap.pretrained.weights import Weights

# By default, the first of these that is measured.
NEW_SKILLS = ("CIDEr", "accuracy")
KEPT_SKILLS = ("text_to_image_recall@5", "acc1")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The figures of every mixture.

    Attributes:
        alphas: shares of the second weights.
        figures: by name, one value for each alpha.
        new, kept: names of the figures that are set against each other.
    """

    alphas: Sequence[float]
    figures: Mapping[str, Sequence[float | None]]
    new: str
    kept: str

    @property
    def knee(self) -> float:
        """The alpha whose point lies farthest beyond the line between the two ends, with both figures scaled to their
        ranges.

        Source: Kneedle (Satopää et al., 2011).
        """
        gained, kept = (self._scaled(name) for name in (self.new, self.kept))
        (x0, x1), (y0, y1) = ((values[0], values[-1]) for values in (gained, kept))
        beyond = [(x - x0) * (y0 - y1) - (y0 - y) * (x1 - x0) for x, y in zip(gained, kept, strict=True)]
        return self.alphas[max(range(len(beyond)), key=beyond.__getitem__)]

    def values(self, name: str) -> list[float]:
        """Return the values of a figure that all mixtures have, `new` or `kept`."""
        return [value for value in self.figures[name] if value is not None]

    def _scaled(self, name: str) -> list[float]:
        values = self.values(name)
        low, high = min(values), max(values)
        return [(value - low) / (high - low or 1.0) for value in values]


def sweep(
    start: Weights,
    end: Weights,
    tasks: Mapping[str, TaskConfig],
    alphas: Sequence[float],
    *,
    device: torch.device,
    new: str | None = None,
    kept: str | None = None,
) -> Sweep:
    """Measure the tasks for every mixture of two models.

    Args:
        alphas: shares of `end`, from 0 to 1.
        new, kept: figures of the tasks, such as `captions/CIDEr`; by default the first CIDEr or accuracy, and the first
            recall@5 from text to image or acc1.

    Raises: ValueError: if alphas are not rising from 0 to 1, the models differ, or a figure is missing or has no value.
    """
    if list(alphas) != sorted(set(alphas)) or len(alphas) < 3 or (alphas[0], alphas[-1]) != (0.0, 1.0):
        raise ValueError(f"alphas are {list(alphas)}; they must rise from 0 to 1, with at least one between")
    require_same_model(start, end)
    results, names = list[Result](), list[str]()
    for alpha in alphas:
        logger.info("alpha %g", alpha)
        model, processor = build_model(mix_weights(start, end, alpha=alpha), device=device, precision="fp32")
        results.append(measure_tasks(tasks, model, processor, command=""))
        if not names:  # a figure that is missing is told after the first of many mixtures
            names = [_choose(new, NEW_SKILLS, results[0], "--new"), _choose(kept, KEPT_SKILLS, results[0], "--kept")]
        for name in names:
            if name not in results[-1].values:
                raise ValueError(f"alpha {alpha:g} has no {name}{_reason(name, results[-1])}")
    return Sweep(
        alphas=alphas,
        figures={name: [result.figures.get(name) for result in results] for name in results[0].figures},
        new=names[0],
        kept=names[1],
    )


def _choose(asked: str | None, usual: Sequence[str], result: Result, option: str) -> str:
    """Return the figure that is asked for, or the first of the usual ones.

    Raises: ValueError: if the result does not have it.
    """
    for name in [asked] if asked else [name for end in usual for name in result.values if name.endswith(f"/{end}")]:
        if name in result.values:
            return name
    wanted = asked or " or ".join(usual)
    raise ValueError(
        f"{option}: no task has the figure {wanted}; there are {', '.join(result.values)}{_reason(asked or '', result)}"
    )


def _reason(name: str, result: Result) -> str:
    """Return why a figure, or its whole task, has no value."""
    found = [result.reasons[each] for each in (name, name.partition("/")[0]) if each in result.reasons]
    return f" ({found[0]})" if found else ""


def write_sweep(found: Sweep, folder: Path, *, command: str) -> None:
    """Write sweep.json, sweep.svg and sweep.png to a folder, each whole or not at all.

    Raises: ImportError: if matplotlib is not installed.
    """
    content = {
        "command": command,
        "versions": list_versions(),
        "alphas": list(found.alphas),
        "knee": found.knee,
        "new": found.new,
        "kept": found.kept,
        "figures": {name: list(values) for name, values in found.figures.items()},
    }
    draw(partial(make_figure, found)).write(folder, "sweep")
    write_text(folder / "sweep.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def make_figure(found: Sweep) -> Any:
    """Return the curve of the kept figure over the new one, with its knee marked."""
    figure = new_figure(5.5, 4.2)
    axes = figure.subplots()
    xs, ys = found.values(found.new), found.values(found.kept)
    axes.plot(xs, ys, color=FIRST, marker="o", markersize=4)
    knee = list(found.alphas).index(found.knee)
    axes.plot([xs[knee]], [ys[knee]], color=SECOND, marker="o", markersize=9, fillstyle="none", linestyle="")
    for alpha, x, y in zip(found.alphas, xs, ys, strict=True):
        text = f"{alpha:g}" + (" (knee)" if alpha == found.knee else "")
        axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", color=NEITHER)
    axes.set_xlabel(found.new, parse_math=False)
    axes.set_ylabel(found.kept, parse_math=False)
    axes.margins(0.12)
    return figure
