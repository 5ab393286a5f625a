"""What is said of a picture: the columns of every output, and how a model fills them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from contracap.generation.captioner import Captioner
from contracap.generation.sampling import Strategy
from contracap.image import normalise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One picture's caption, and its contrastive embedding (unit length) if that was asked for.

    Attributes:
        path: the picture's name.
        score: what ranked the caption, higher is better; None where an output does not keep it.
    """

    path: str
    caption: str
    score: float | None
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
) -> list[Row]:
    """A row for each picture of a batch, its caption between `prefix` and `suffix`.

    Raises:
        ValueError: if a setting or the prompt does not suit the model, or the model gives numbers that are not finite.
    """
    device = next(captioner.model.parameters()).device
    normalised = normalise(pixels.to(device, non_blocking=True), captioner.processor.image_config)
    captions = captioner.generate(normalised, strategy, **({"prompts": prompt} if prompt else {}))
    embeddings = embedding_rows(captioner, normalised) if embed else [None] * len(captions)
    return [
        Row(path=name, caption=f"{prefix}{caption.text}{suffix}", score=caption.score, embedding=embedding)
        for name, caption, embedding in zip(names, captions, embeddings, strict=True)
    ]


@torch.inference_mode()
def embedding_rows(captioner: Captioner, normalised: Tensor) -> list[np.ndarray]:
    return list(captioner.model.encode_image(normalised.to(next(captioner.model.parameters()))).float().cpu().numpy())
