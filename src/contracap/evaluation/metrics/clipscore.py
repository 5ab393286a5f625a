"""CLIPScore: how well captions fit their images, as a contrastive model judges, with or without references.

Source: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (arXiv 2104.08718).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from contracap.evaluation.features import embed_images, embed_texts, full_precision
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

PROMPT = "A photo depicts "
WEIGHT = 2.5  # scales the usual cosines to 0..1
BATCH = 64


class ClipScorer:
    """Computes CLIPScore and RefCLIPScore with one model. Scores by two models cannot be compared.

    Attributes:
        name: the model's name, for the result.
    """

    def __init__(self, model: CoCa, processor: Processor, *, name: str):
        self.model, self.processor, self.name = model, processor, name

    @torch.inference_mode()
    def score(
        self,
        images: Sequence[bytes | str | Path] | Float32[Tensor, "image 3 height width"],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> tuple[list[float], list[float]]:
        """Return CLIPScore and RefCLIPScore of each caption.

        The first is 2.5 max(cos(image, caption), 0), the second the harmonic mean of that and of the largest cosine
        between the caption and a reference, or 0.

        Args:
            images: bytes of files or paths, or pixels as `processor` returns them.
            captions: one for each image.
            references: for each image the captions that people wrote, at least one.

        Raises: FileNotFoundError, ImageError: naming an image that is missing or cannot be used. ValueError: if the
            model's features are not finite.
        """
        scores, with_references = [], []
        with evaluating(self.model):
            for first in range(0, len(images), BATCH):
                chunk = slice(first, first + BATCH)
                pixels = images[chunk] if isinstance(images, Tensor) else self.processor.images(images[chunk])
                clip, both = self._score(pixels, captions[chunk], references[chunk])
                scores += clip.tolist()
                with_references += both.tolist()
        return scores, with_references

    def _score(
        self,
        pixels: Float32[Tensor, "image 3 height width"],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> tuple[Float32[Tensor, "image"], Float32[Tensor, "image"]]:
        images = embed_images(self.model, pixels)
        texts = self._embed(captions)
        written = self._embed([caption for own in references for caption in own])
        with full_precision(images.device):
            clip = WEIGHT * (images * texts).sum(dim=1).clamp(min=0)
            cosines = zip(written.split([len(own) for own in references]), texts, strict=True)
            nearest = torch.stack([(own @ text).max().clamp(min=0) for own, text in cosines])
        total = clip + nearest
        return clip, torch.where(total > 0, 2 * clip * nearest / total, 0.0)

    def _embed(self, texts: Sequence[str]) -> Float32[Tensor, "text embed"]:
        return embed_texts(self.model, self.processor, [PROMPT + text for text in texts], BATCH)
