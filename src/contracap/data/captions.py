"""The choice of an image's caption in training."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from contracap.data.samples import Sample, SampleError, texts_in


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Rule by which the caption of an image is chosen."""

    use: Literal["random", "first", "all"] = "random"
    """Use a `random` caption of the image each time it is drawn, its `first` caption, or `all` of them, one after
    the other."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often the caption is taken from each field of the `.json`, such as `{ captions = 0.3, recaption = 0.7 }`,
    in proportion among the fields that a sample has. Empty: the sample's captions are used."""
    lines: bool = True
    """Each line of a `.txt` is a caption; otherwise the whole file is one."""
    max_tokens: int | None = None
    """Captions are cut to this many tokens in training, start and end token included. The default is the model's
    context. Short texts first make a long run cheaper (CLIPA, arXiv 2305.07017)."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 3: start, one token and end")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of caption field {name} is {weight}; it must be above 0")


def choose_caption(sample: Sample, config: CaptionConfig, generator: np.random.Generator) -> str:
    """Choose a caption by the rule.

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
    """Return every caption that the rule may choose, in order.

    Raises:
        SampleError: if there is none.
    """
    return [caption for captions in _texts(sample, config).values() for caption in captions]


def require_captions(sample: Sample) -> tuple[str, ...]:
    """Return the captions of a sample that must have one.

    Raises:
        SampleError: if there is none; names a text that could not be read.
    """
    if not sample.captions:
        raise _no_caption(sample)
    return sample.captions


def _texts(sample: Sample, config: CaptionConfig) -> dict[str, tuple[str, ...]]:
    """Return the captions by field, without empty fields."""
    if not config.weights:
        return {"captions": require_captions(sample)}
    found = {name: texts_in(sample.fields.get(name)) for name in config.weights}
    found = {name: captions for name, captions in found.items() if captions}
    if not found:
        raise _no_caption(sample, f" in {', '.join(config.weights)}")
    return found


def _no_caption(sample: Sample, where: str = "") -> SampleError:
    why = f" ({sample.problem})" if sample.problem else ""
    return SampleError(f"{sample.name} has no caption{where}{why}", kind="broken_text" if why else "no_caption")
