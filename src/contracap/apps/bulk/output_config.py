"""The configuration that captions depend on, apart from their images. It is stored with them, so that no other run adds
to them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contracap import __version__
from contracap.config import flatten, to_dict
from contracap.files import write_text
from contracap.generation.registry import STRATEGIES
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.processor import Processor

OutputConfig = Mapping[str, Any]
"""Ready for JSON."""


class OutputConfigError(ValueError):
    """An output that belongs to a run with other settings; the message names it and says what to do."""


def caption_config(strategy: Strategy | None, prompt: str, model: CoCa, processor: Processor) -> dict[str, Any]:
    """Return all that the text of a caption depends on."""
    named = strategy and {"name": type(strategy).__name__, **to_dict(strategy)}
    return {
        "weights_sha256": _digest(model, processor),
        "precision": model.precision,
        "strategy": named,
        "prompt": prompt,
    }


def describe_run(weights: str, model: CoCa, processor: Processor) -> dict[str, Any]:
    """Describe the origin of an output for its readers, ready for JSON."""
    return {
        "contracap": __version__,
        "weights": weights,
        "model": to_dict(model.config),
        "image": to_dict(processor.image_config),
    }


def describe_changes(before: OutputConfig, now: OutputConfig) -> str:
    """Describe what differs, for a message; empty if nothing does. For another strategy, its name stands for
    all of its settings."""
    other = [name for name in now if before.get(name) != now[name]]
    old, new = (dict(flatten({name: side.get(name) for name in other})) for side in (before, now))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    told = list[str]()
    if "strategy.name" in keys:
        named = {cls.__name__: name for name, cls in STRATEGIES.items()}
        former, current = (named.get(side.get("strategy.name", ""), "none") for side in (old, new))
        told = [f"strategy {former}, now {current}"]
        keys = [key for key in keys if not key.startswith("strategy.")]
    return "; ".join([*told, *(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)])


class ConfigFile:
    """A hidden file with the settings of the output next to it."""

    def __init__(self, path: Path, config: OutputConfig) -> None:
        self.path, self.config = path, config

    def check(self, output: str, remedy: str) -> None:
        """Refuse captions of other settings.

        Raises:
            OutputConfigError: if the captions of `output` were made with other settings.
            OSError: if the file cannot be read.
        """
        try:
            before = dict(json.loads(self.path.read_bytes()))
        except FileNotFoundError:  # captions of other origin may be added to
            return
        except (ValueError, TypeError) as error:
            raise OutputConfigError(f"{self.path} does not hold settings: {error}; delete it") from None
        if different := describe_changes(before, self.config):
            raise OutputConfigError(f"{output} holds captions of other settings: {different}. {remedy}")

    def write(self) -> None:
        """Make these settings those of the output."""
        write_text(self.path, json.dumps(self.config, indent=2) + "\n")


def _digest(model: CoCa, processor: Processor) -> str:
    """Return a digest of the configuration and every tensor."""
    digest = hashlib.sha256(json.dumps([to_dict(model.config), to_dict(processor.image_config)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
