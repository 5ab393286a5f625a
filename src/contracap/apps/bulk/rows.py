"""Rows of every output, one for each image, and the model that fills them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from torch import Tensor

from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.images import normalise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One image's caption, and its contrastive embedding (unit length) if that was asked for.

    Attributes:
        path: the image's name.
        score: what ranked the caption, higher is better; None where an output does not keep it.
        log_probability: of its tokens, in nats; None as for `score`.
    """

    path: str
    caption: str
    score: float | None
    log_probability: float | None = None
    embedding: Float32[np.ndarray, "embed"] | None = None


def caption_rows(
    captioner: Captioner,
    names: Sequence[str],
    pixels: UInt8[Tensor, "batch 3 height width"],
    strategy: Strategy,
    *,
    prompt: str = "",
    prefix: str = "",
    suffix: str = "",
    embed: bool = False,
    raw: bool = False,
) -> list[Row]:
    """A row for each image of a batch, its caption between `prefix` and `suffix`; with `raw` its raw text.

    Raises:
        ValueError: if a setting or the prompt does not suit the model, or the model gives numbers that are not finite.
    """
    normalised = normalise(pixels.to(captioner.model.device, non_blocking=True), captioner.processor.image_config)
    captions = captioner.generate(normalised, strategy, prompt, [image_number(name) for name in names])
    return [
        Row(
            path=name,
            caption=f"{prefix}{caption.raw_text if raw else caption.text}{suffix}",
            score=caption.score,
            log_probability=caption.log_probability,
            embedding=caption.embedding.numpy() if embed else None,
        )
        for name, caption in zip(names, captions, strict=True)
    ]


def image_number(name: str) -> int:
    """Return a number for sampling, made of the name: neither a batch nor an interruption changes the samples."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little") >> 1
