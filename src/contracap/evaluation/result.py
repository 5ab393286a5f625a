"""The result of an evaluation, and its JSON file."""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

from contracap.files import write_text
from contracap.model.coca import CoCa

RESULTS_FILE = "results.json"  # in a folder of its own
OWN_KEYS = frozenset({"command", "versions", "seed", "samples", "figures", "reasons", "per_sample"})  # of every result

Predictions = TypeVar("Predictions")
NONE: Any = ()  # predictions of an evaluator that makes none
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


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """The values of a figure for each sample; the figure is their mean.

    Attributes:
        samples: a digest of the samples' keys, in order: the values of two results pair up if it is the same.
    """

    samples: str
    values: Sequence[float]

    @classmethod
    def of(cls, keys: Sequence[str], values: Sequence[float]) -> "PerSample":
        """Return values of the samples with these keys."""
        return cls(samples=compute_digest(keys), values=values)


def compute_digest(keys: Sequence[str]) -> str:
    """Return a digest of the keys of samples, in order."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Predictions]):
    """Figures, and what they rest on.

    Attributes:
        figures: name to number, or to None with the reason under the same name in `reasons`.
        samples: number of samples.
        per_sample: the values of each sample, for figures that are means over samples.
        predictions: the model's output for the samples, in a form of the task's own; not in the file.
        details: further keys of the file, such as `bleu_stats`.
        command: the command line as it was typed.
        seed: the seed of the run; None if nothing was random.

    Raises: ValueError: if a figure is None without a reason, or a detail has the name of another key of the file.
    """

    figures: Mapping[str, float | None]
    samples: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    per_sample: Mapping[str, PerSample] = field(default_factory=dict)
    predictions: Predictions = field(default=NONE, compare=False, repr=False)
    details: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    seed: int | None = None

    @classmethod
    def of_samples(
        cls,
        keys: Sequence[str],
        figures: Mapping[str, float],
        *,
        per_sample: Mapping[str, Sequence[float]] = MappingProxyType({}),
        reasons: Mapping[str, str] = MappingProxyType({}),
        predictions: Predictions = NONE,
        details: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Result[Predictions]":
        """Return the result of one evaluator on the samples with these keys.

        Args:
            per_sample: the values of each sample, in the order of the keys. Values of other units, such as captions,
                are divided among the samples that they belong to.
            reasons: why other figures could not be computed.
        """
        return cls(
            samples=len(keys),
            figures={**figures, **dict.fromkeys(reasons)},
            reasons=reasons,
            per_sample={name: PerSample.of(keys, values) for name, values in per_sample.items()},
            predictions=predictions,
            details={"keys_digest": compute_digest(keys), **details},
        )

    @property
    def values(self) -> dict[str, float]:
        """The figures that could be computed."""
        return {name: value for name, value in self.figures.items() if value is not None}

    def __post_init__(self) -> None:
        unexplained = [name for name, value in self.figures.items() if value is None and name not in self.reasons]
        if unexplained:
            raise ValueError(f"figures without a value or a reason: {', '.join(unexplained)}")
        taken = OWN_KEYS & self.details.keys()
        if taken:
            raise ValueError(f"details would overwrite the result's own keys: {', '.join(sorted(taken))}")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file. A figure that is not a finite number becomes null with a reason."""
        reasons = dict(self.reasons)
        figures: dict[str, float | None] = {}
        for name, value in self.figures.items():
            finite = value is not None and math.isfinite(value)
            figures[name] = value if finite else None
            if not finite:
                reasons.setdefault(name, f"came out as {value}, which is not a finite number")
        own = {"command": self.command, "versions": list_versions(), "seed": self.seed, "samples": self.samples}
        content = own | {"figures": figures, "reasons": reasons} | dict(self.details)
        if self.per_sample:
            content["per_sample"] = {name: vars(values) for name, values in self.per_sample.items()}
        return content

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all, and create its folder. The values of a figure take one line."""
        content = self.to_dict()
        per_sample = content.pop("per_sample", {})
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        if per_sample:
            lines = (
                f"    {json.dumps(name)}: {json.dumps(found, allow_nan=False)}" for name, found in per_sample.items()
            )
            text = text.removesuffix("\n}") + ',\n  "per_sample": {\n' + ",\n".join(lines) + "\n  }\n}"
        write_text(path, text + "\n")


Evaluator = Callable[[CoCa], Result[Any]]


def unexpected(error: Exception) -> Exception | None:
    """Return an error if its traceback is worth a look: it is not of the data, a file or the device's memory."""
    return None if isinstance(error, OSError | ValueError | torch.OutOfMemoryError) else error


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a figure."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
