"""A strategy by its name and settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from contracap.config import ConfigError, _assign, build
from contracap.generation.beam import BeamSearch
from contracap.generation.sampling import Greedy, Strategy

STRATEGIES = {"greedy": Greedy, "beam": BeamSearch}


def build_strategy(name: str, settings: Mapping[str, Any] | Sequence[str] = ()) -> Strategy:
    """Raises: ConfigError: for an unknown name, an unknown setting or a wrong value."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; the strategies are {', '.join(STRATEGIES)}")
    values: dict[str, Any] = {}
    if isinstance(settings, Mapping):
        values = dict(settings)
    else:
        for setting in settings:
            _assign(values, setting)
    return build(STRATEGIES[name], values)
