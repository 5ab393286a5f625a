"""What the batcher's threads do with the model: each method takes one batch and gives an answer for each item."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from contracap.evaluation.features import embed_texts, finite
from contracap.evaluation.zeroshot import classifier
from contracap.generation.captioner import Caption, Captioner
from contracap.generation.strategy import Strategy
from contracap.images import decode, normalise, resize_and_crop
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

Picture = UInt8[Tensor, "3 height width"]


class ServedModel:
    """A model and its processor. Only `picture` may be called from several threads at once.

    Attributes:
        captioner: None if the model has no text decoder (a CLIP).
    """

    def __init__(self, model: CoCa, processor: Processor):
        self.model, self.processor = model.eval(), processor
        self.captioner = Captioner(model, processor) if model.decoder is not None else None
        self.logit_scale = model.logit_scale.detach().exp().item()
        self._classifier = lru_cache(maxsize=64)(self._new_classifier)

    def picture(self, data: bytes) -> Picture:
        """The image in a file's bytes, as the model sees it before normalisation.

        Raises: ImageError: if it cannot be used.
        """
        return resize_and_crop(decode(data), self.processor.image_config)

    def captions(
        self, strategy: Strategy, asked: list[tuple[Picture, str]], go_on: Callable[[], object]
    ) -> list[Caption]:
        """A caption for each image, which begins with its prompt.

        Raises: ValueError: if the model gives numbers that are not finite.
        """
        assert self.captioner is not None  # who has none does not ask
        pictures, prompts = zip(*asked, strict=True)
        # One number for all, so that what is sampled does not depend on the company.
        return self.captioner.generate(self._pixels(list(pictures)), strategy, prompts, [0] * len(asked), go_on)

    @torch.inference_mode()
    def picture_embeddings(self, _: None, pictures: list[Picture], go_on: object) -> list[Float32[Tensor, "embed"]]:
        """A unit vector for each image."""
        with evaluating(self.model):
            return list(finite(self.model.encode_image(self._pixels(pictures)), "images").cpu())

    @torch.inference_mode()
    def text_embeddings(self, _: None, texts: list[str], go_on: object) -> list[Float32[Tensor, "embed"]]:
        """A unit vector for each text; what does not fit the context is cut off."""
        with evaluating(self.model):
            return list(embed_texts(self.model, self.processor, texts, batch_size=len(texts)).cpu())

    def similarities(
        self, classes: tuple[tuple[str, ...], tuple[str, ...]], pictures: list[Picture], go_on: object
    ) -> list[Float32[Tensor, "label"]]:
        """For each image its cosine with each label; `classes` are the labels and the templates they stand in."""
        weights = self._classifier(*classes)
        return list(torch.stack(self.picture_embeddings(None, pictures, go_on)) @ weights.T)

    def _new_classifier(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Float32[Tensor, "label embed"]:
        return classifier(self.model, self.processor, labels, templates).cpu()

    def _pixels(self, pictures: list[Picture]) -> Float32[Tensor, "batch 3 height width"]:
        return normalise(torch.stack(pictures).to(self.model.device), self.processor.image_config)
