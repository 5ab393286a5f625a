"""Strategies by name, with settings as they are written on a command line, on a page or in a request."""

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
    """The strategy of this name with these settings; what is left out keeps its default.

    Args:
        name: a key of `STRATEGIES`.
        settings: values by field name, nested like the dataclasses; or "key=value" each, such as "width=4",
            "rules.no_repeat_ngram=3" or "rules.banned=['red']". What "rerank" ranks takes settings such as
            "of.samples=4", and is a beam search where they are those of one: "of.width=4".

    Raises:
        ConfigError: for an unknown name or key, with the nearest right one, or a wrong value.
        SettingsHelp: for "help" as one of the settings.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, n=1)
        right = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(STRATEGIES)}"
        raise ConfigError(f"unknown strategy '{name}'; {right}")
    if "help" in settings and not isinstance(settings, Mapping):
        raise SettingsHelp(keys_text(STRATEGIES[name]))
    try:
        values: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {}
        for setting in () if isinstance(settings, Mapping) else settings:
            if "=" not in setting:
                raise ConfigError(f"{setting!r} is not a setting (name=value): put paths before --set")
            assign(values, setting)
        return reranking(values) if name == "rerank" else build(STRATEGIES[name], values)
    except ConfigError as error:
        raise ConfigError(f"strategy '{name}': {error}") from None


def reranking(values: Mapping[str, Any]) -> ContrastiveReranking:
    """A reranking of the strategy whose settings `of` has, that of the default unless they fit the other better."""
    outer = build(ContrastiveReranking, {key: value for key, value in values.items() if key != "of"})
    inner = values.get("of", {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"'of' must be a table, such as of.samples=8, not {inner!r}")

    def unknown(cls: type) -> int:
        return len(set(inner) - {field.name for field in dataclasses.fields(cls)})

    cls = min((Sampling, BeamSearch), key=unknown)
    kept = to_dict(outer.of) if isinstance(outer.of, cls) else {}
    try:
        return dataclasses.replace(outer, of=build(cls, kept | dict(inner)))
    except ConfigError as error:
        raise ConfigError(f"in 'of': {error}") from None
