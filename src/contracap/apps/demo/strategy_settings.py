"""Settings of each strategy that a visitor can change. Their defaults are those of the strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contracap.generation.beam import BeamSearch
from contracap.generation.constraints import Rules
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Sampling


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    key: str
    label: str
    values: tuple[Any, ...]
    default: Any


@dataclass(frozen=True)
class Amount:
    """A number from `low` to `high` in steps. `off`: the value that stands for no such rule, and is not passed on."""

    key: str
    label: str
    low: int | float
    high: int | float
    step: int | float
    default: int | float
    off: int | float | None = None


@dataclass(frozen=True)
class Phrases:
    """Words or phrases, commas between them; none by default."""

    key: str
    label: str


Setting = Choice | Amount | Phrases

NAMES = {
    "beam": "Beam search",
    "greedy": "Greedy",
    "sample": "Sampling",
    "rerank": "Sampling, ranked by the image",
    "legacy": "Beam search of the 2023 release",
}

LENGTHS = (
    Amount("max_tokens", "Most tokens", 3, 76, 1, BeamSearch.max_tokens),
    Amount("min_tokens", "Fewest tokens", 1, 30, 1, BeamSearch.min_tokens),
)
RULES = (
    Amount("rules.repetition_penalty", "Repetition penalty (1: none)", 1, 3, 0.05, Rules.repetition_penalty, off=1),
    Amount("rules.no_repeat_ngram", "Tokens of a run that must not repeat (0: none)", 0, 6, 1, 0, off=0),
    Phrases("rules.banned", "Words it must not use"),
    Phrases("rules.forced", "Words it must use"),
)
SAMPLING = (
    Amount("temperature", "Temperature", 0.1, 2, 0.05, Sampling.temperature),
    Amount("top_k", "Top-k: number of likeliest tokens to draw from (0: all)", 0, 200, 1, 0, off=0),
    Amount("top_p", "Top-p: total probability of the tokens to draw from (1: all)", 0.05, 1, 0.01, 1, off=1),
    Amount("min_p", "Min-p: only tokens of this share of the likeliest (0: all)", 0, 0.9, 0.01, 0, off=0),
    Amount("seed", "Seed", 0, 9999, 1, Sampling.seed),
)
SETTINGS_OF: Mapping[str, tuple[Setting, ...]] = {
    "beam": (
        Amount("width", "Beams", 1, 12, 1, BeamSearch.width),
        Amount("length_penalty", "Length penalty (above 0: longer texts)", -2, 3, 0.1, BeamSearch.length_penalty),
        Amount("groups", "Groups of beams that differ", 1, 6, 1, BeamSearch.groups, off=1),
        Amount("diversity", "How much the groups differ", 0, 3, 0.1, BeamSearch.diversity, off=0),
    ),
    "greedy": (),
    "sample": (*SAMPLING, Amount("samples", "Samples", 1, 16, 1, Sampling.samples)),
    "rerank": (*SAMPLING, Amount("samples", "Samples", 2, 32, 1, ContrastiveReranking.of.num_texts)),
    "legacy": (Choice("year", "Rule of the year", (2023, 2024), 2023),),
}


def read_settings(name: str, settings: Sequence[Setting], answers: Sequence[Any]) -> dict[str, Any]:
    """Return the answers as `generation.registry` takes them for a strategy, without what is off or empty.

    Raises: ValueError: if a number is none, or out of its bounds.
    """
    values: dict[str, Any] = {}
    for setting, answer in zip(settings, answers, strict=True):
        *outer, key = setting.key.split(".")
        if isinstance(setting, Phrases):
            value = tuple(phrase.strip() for phrase in (answer or "").split(",") if phrase.strip()) or None
        elif isinstance(setting, Amount):
            value = _read_amount(setting, answer)
        else:
            value = answer
        if value is not None:
            table = values.setdefault(outer[0], {}) if outer else values
            table[key] = value
    return {"of": values} if name == "rerank" else values


def _read_amount(setting: Amount, answer: Any) -> int | float | None:
    """Return the number, whole where the steps are; None if it is the one for off."""
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not setting.low <= answer <= setting.high:
        raise ValueError(f"{setting.label} is {answer}; it must be a number from {setting.low} to {setting.high}")
    if answer == setting.off:
        return None
    return int(answer) if float(setting.step).is_integer() else answer
