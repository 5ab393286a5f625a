"""Strategies by name, with settings from a command line, a web page or a request."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from contracap.config import ConfigError, SettingsHelp, assign, build, keys_text, to_dict
from contracap.generation.beam import BeamSearch
from contracap.generation.legacy import LegacyBeamSearch
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Greedy, Sampling
from contracap.generation.strategy import Strategy

STRATEGIES: dict[str, type] = {
    "greedy": Greedy,
    "beam": BeamSearch,
    "sample": Sampling,
    "legacy": LegacyBeamSearch,
    "rerank": ContrastiveReranking,
}


def build_strategy(name: str, settings: Mapping[str, Any] | Sequence[str] = ()) -> Strategy:
    """Return the strategy of this name with these settings; the others keep their defaults.

    Args:
        name: a key of `STRATEGIES`.
        settings: values by field name, nested like the dataclasses; or strings such as "width=4",
            "rules.no_repeat_ngram=3" or "rules.banned=['red']". For "rerank", settings of the strategy that writes the
            texts start with "of.". Settings of beam search, such as "of.width=4", select beam search.

    Raises:
        ConfigError: for a wrong value, or an unknown name or key; names the closest valid one.
        SettingsHelp: if one of the settings is "help".
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(STRATEGIES)}"
        raise ConfigError(f"unknown strategy '{name}'; {hint}")
    if "help" in settings and not isinstance(settings, Mapping):
        raise SettingsHelp(keys_text(STRATEGIES[name]))
    try:
        values: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {}
        for setting in () if isinstance(settings, Mapping) else settings:
            if "=" not in setting:
                raise ConfigError(f"{setting!r} is not a setting (name=value): put paths before --set")
            assign(values, setting)
        return _build_reranking(values) if name == "rerank" else build(STRATEGIES[name], values)
    except ConfigError as error:
        raise ConfigError(f"strategy '{name}': {error}") from None


def _build_reranking(values: Mapping[str, Any]) -> ContrastiveReranking:
    """Return a reranking of samples, or of a beam search if the settings under `of` fit that better."""
    outer = build(ContrastiveReranking, {key: value for key, value in values.items() if key != "of"})
    inner = values.get("of", {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"'of' must be a table, such as of.samples=8, not {inner!r}")

    def count_unknown(cls: type) -> int:
        return len(set(inner) - {field.name for field in dataclasses.fields(cls)})

    cls = min((Sampling, BeamSearch), key=count_unknown)
    defaults = to_dict(outer.of) if isinstance(outer.of, cls) else {}
    try:
        return dataclasses.replace(outer, of=build(cls, defaults | dict(inner)))
    except ConfigError as error:
        raise ConfigError(f"in 'of': {error}") from None
