"""Strategies by name, with their settings as a command line gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

from contracap.config import ConfigError, _assign, build
from contracap.generation.beam import BeamSearch
from contracap.generation.sampling import Greedy, Strategy

STRATEGIES: dict[str, type[Strategy]] = {"greedy": Greedy, "beam": BeamSearch}


def build_strategy(name: str, settings: Mapping[str, Any] | Sequence[str] = ()) -> Strategy:
    """A strategy by its name, with settings by key or as `key=value`.

    Raises: ConfigError: for an unknown name, and for settings that are unknown or wrong.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; the strategies are {', '.join(STRATEGIES)}")
    values = dict(settings) if isinstance(settings, Mapping) else {}
    for setting in () if isinstance(settings, Mapping) else settings:
        _assign(values, setting)
    return build(STRATEGIES[name], values)
