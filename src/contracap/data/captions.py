"""Which of a picture's captions stands for it in training."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from contracap.data.shards import Sample, SampleError


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The rule.

    Attributes:
        use: a `random` caption of the picture each time it comes, its `first`, or `all`, one after the other.
        weights: fields of the `.json` and how often the caption is taken from each, such as
            `{ caption = 0.3, recaption = 0.7 }`: of those that a sample has, in proportion. Empty: its captions.
        max_tokens: captions are cut to so many tokens in training, start and end included; by default to the model's
            context. Short texts first make a long run cheaper (CLIPA, arXiv 2305.07017).
    """

    use: Literal["random", "first", "all"] = "random"
    weights: dict[str, float] = field(default_factory=dict)
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 3: start, one token and end")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of caption field {name} is {weight}; it must be above 0")


def choose_caption(sample: Sample, config: CaptionConfig, generator: np.random.Generator) -> str:
    """One caption, by the rule.

    Raises:
        SampleError: if there is none.
    """
    texts = _texts(sample, config)
    groups = list(texts.values())
    if len(groups) > 1:
        weights = np.array([config.weights[name] for name in texts])
        groups = [groups[generator.choice(len(groups), p=weights / weights.sum())]]
    (captions,) = groups
    return captions[0] if config.use == "first" else captions[generator.integers(len(captions))]


def all_captions(sample: Sample, config: CaptionConfig) -> list[str]:
    """Every caption that the rule may choose, in order.

    Raises:
        SampleError: if there is none.
    """
    return [caption for captions in _texts(sample, config).values() for caption in captions]


def _texts(sample: Sample, config: CaptionConfig) -> dict[str, tuple[str, ...]]:
    """The captions by field, without empty fields."""
    if not config.weights:
        found = {"captions": sample.captions}
    else:
        found = {name: _field(sample, name) for name in config.weights}
    found = {name: captions for name, captions in found.items() if captions}
    if not found:
        wanted = f" in {', '.join(config.weights)}" if config.weights else ""
        raise SampleError(f"sample {sample.key} of {sample.shard} has no caption{wanted}", kind="no_caption")
    return found


def _field(sample: Sample, name: str) -> tuple[str, ...]:
    value = sample.fields.get(name, [])
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(
            f"sample {sample.key} of {sample.shard}: {name} must be a string or a list of strings", kind="broken_text"
        )
    return tuple(caption for caption in (caption.strip() for caption in captions) if caption)
