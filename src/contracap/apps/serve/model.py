"""The work of the batcher's threads: each method takes one batch and returns an answer for each item."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from contracap.evaluation.features import embed_texts, require_finite
from contracap.evaluation.zeroshot import build_classifier, compare_with_labels
from contracap.generation.captioner import Caption, Captioner
from contracap.generation.strategy import Strategy
from contracap.image_files import decode
from contracap.images import normalise, resize_and_crop
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

Image = UInt8[Tensor, "3 height width"]


class ServedModel:
    """A model and its processor. Only `read_image` may be called from several threads at once.

    Attributes:
        captioner: None if the model has no text decoder (a CLIP).
    """

    def __init__(self, model: CoCa, processor: Processor):
        self.model, self.processor = model.eval(), processor
        self.captioner = Captioner(model, processor) if model.decoder is not None else None
        self.logit_scale = model.logit_scale.detach().exp().item()
        self._classifier = lru_cache(maxsize=64)(self._new_classifier)

    def read_image(self, data: bytes) -> Image:
        """Decode an image file's bytes, resize and crop it; it is not normalised yet.

        Raises: ImageError: if it cannot be used.
        """
        return resize_and_crop(decode(data), self.processor.image_config)

    def captions(
        self, strategy: Strategy, asked: list[tuple[Image, str]], check_cancelled: Callable[[], object]
    ) -> list[Caption]:
        """Write a caption for each image, which begins with its prompt.

        Raises: ValueError: if the model gives numbers that are not finite.
        """
        assert self.captioner is not None  # who has none does not ask
        images, prompts = zip(*asked, strict=True)
        # One number for all, so that what is sampled does not depend on the company.
        return self.captioner.generate(self._pixels(list(images)), strategy, prompts, [0] * len(asked), check_cancelled)

    @torch.inference_mode()
    def image_embeddings(self, _: None, images: list[Image], check_cancelled: object) -> list[Float32[Tensor, "embed"]]:
        """Return a unit vector for each image."""
        with evaluating(self.model):
            return list(require_finite(self.model.encode_image(self._pixels(images)), "images").cpu())

    @torch.inference_mode()
    def text_embeddings(self, _: None, texts: list[str], check_cancelled: object) -> list[Float32[Tensor, "embed"]]:
        """Return a unit vector for each text; what does not fit the context is cut off."""
        with evaluating(self.model):
            return list(embed_texts(self.model, self.processor, texts, batch_size=len(texts)).cpu())

    def similarities(
        self, classes: tuple[tuple[str, ...], tuple[str, ...]], images: list[Image], check_cancelled: object
    ) -> list[tuple[Float32[Tensor, "label"], Float32[Tensor, "label"]]]:
        """Return cosine and probability of each label for each image; `classes` are labels and their templates."""
        embeddings = torch.stack(self.image_embeddings(None, images, check_cancelled))
        return list(zip(*compare_with_labels(embeddings, self._classifier(*classes), self.logit_scale), strict=True))

    def _new_classifier(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Float32[Tensor, "label embed"]:
        return build_classifier(self.model, self.processor, labels, templates).cpu()

    def _pixels(self, images: list[Image]) -> Float32[Tensor, "batch 3 height width"]:
        return normalise(torch.stack(images).to(self.model.device), self.processor.image_config)
