"""The JSON result of a command: what was run, on how many samples, and the figures that came out."""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from contracap.files import write_text

RESULTS_FILE = "results.json"  # in a folder of its own
OWN_KEYS = frozenset({"command", "versions", "seed", "samples", "figures", "reasons", "per_sample"})  # of every result

VERSIONED = (
    "contracap",
    "torch",
    "numpy",
    "pillow",
    "simplejpeg",
    "tokenizers",
    "open_clip_torch",
    "clip_benchmark",
    "pycocoevalcap",
    "torchvision",
    "webdataset",
)


@runtime_checkable
class Evaluator(Protocol):
    """What all evaluators are: `run` yields figures, the rest is filled in once it has come to its end.

    Attributes:
        samples: how many there were.
        keys: of the samples, in their order.
        per_sample: of each figure that is a mean over samples, the value of each sample. What is counted in other
            units is spread over the samples they belong to.
        reasons: figures that could not be computed, with the reason.
        details: what else belongs into the result, beside the figures.
    """

    samples: int
    keys: list[str]
    per_sample: dict[str, list[float]]
    reasons: dict[str, str]
    details: dict[str, Any]

    def run(self, model: Any) -> Iterator[tuple[str, float]]:
        """Name and value of each figure that can be computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """A figure's value for each sample; the figure is their mean.

    Attributes:
        samples: a digest of the samples' keys, in their order: values of two results pair up where it is the same.
    """

    samples: str
    values: Sequence[float]

    @classmethod
    def of(cls, keys: Sequence[str], values: Sequence[float]) -> "PerSample":
        """Values of the samples with these keys."""
        return cls(samples=digest(keys), values=values)


def digest(keys: Sequence[str]) -> str:
    """Stands for the keys of samples, in their order."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command leaves behind.

    Attributes:
        command: as it was typed.
        seed: of the run; None if nothing random took part.
        samples: that the figures rest on.
        figures: name to number, or to None with the reason under the same name in `reasons`.
        per_sample: of the figures that are means over samples, what they are means of.
        details: further keys of the file, such as `bleu_stats`.

    Raises:
        ValueError: if a figure is None without a reason, or a detail has the name of a key of its own.
    """

    command: str
    seed: int | None
    samples: int
    figures: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    per_sample: Mapping[str, PerSample] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unexplained = [name for name, value in self.figures.items() if value is None and name not in self.reasons]
        if unexplained:
            raise ValueError(f"figures without a value or a reason: {', '.join(unexplained)}")
        taken = OWN_KEYS & self.details.keys()
        if taken:
            raise ValueError(f"details would overwrite the result's own keys: {', '.join(sorted(taken))}")

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; a figure that is no finite number becomes null with a reason."""
        reasons = dict(self.reasons)
        figures: dict[str, float | None] = {}
        for name, value in self.figures.items():
            finite = value is not None and math.isfinite(value)
            figures[name] = value if finite else None
            if not finite:
                reasons.setdefault(name, f"came out as {value}, which is no finite number")
        own = {"command": self.command, "versions": versions(), "seed": self.seed, "samples": self.samples}
        content = own | {"figures": figures, "reasons": reasons} | dict(self.details)
        if self.per_sample:
            content["per_sample"] = {name: vars(values) for name, values in self.per_sample.items()}
        return content

    def write(self, path: str | Path) -> None:
        """Writes the file, whole or not at all; its folder is made if need be. A figure's values for the samples, which
        may be many thousands, take one line."""
        content = self.to_dict()
        per_sample = content.pop("per_sample", {})
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        if per_sample:
            lines = (
                f"    {json.dumps(name)}: {json.dumps(found, allow_nan=False)}" for name, found in per_sample.items()
            )
            text = text.removesuffix("\n}") + ',\n  "per_sample": {\n' + ",\n".join(lines) + "\n  }\n}"
        write_text(path, text + "\n")


def measure(evaluator: Evaluator, model: Any, *, command: str, seed: int | None = None) -> Result:
    """Runs an evaluator to its end; what it cannot compute is None, with the reason. The details hold a digest of the
    samples' keys beside the evaluator's own."""
    figures = dict(evaluator.run(model))
    return Result(
        command=command,
        seed=seed,
        samples=evaluator.samples,
        figures=figures | dict.fromkeys(evaluator.reasons),
        reasons=evaluator.reasons,
        per_sample={name: PerSample.of(evaluator.keys, values) for name, values in evaluator.per_sample.items()},
        details={"keys_digest": digest(evaluator.keys)} | evaluator.details,
    )


def unexpected(error: Exception) -> Exception | None:
    """The error, if it is none that data, a file or the device's memory gives: its traceback is worth a look."""
    return None if isinstance(error, OSError | ValueError | torch.OutOfMemoryError) else error


def versions() -> dict[str, str]:
    """Python's version and those of the packages that can change a figure, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
