"""Actions of the page's buttons, without the page."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from contracap.apps.demo.overlay import overlay
from contracap.evaluation.class_names import check_templates
from contracap.evaluation.features import embed_texts, require_finite
from contracap.evaluation.zeroshot import build_classifier, compare_with_labels, count_characters
from contracap.generation.captioner import Caption, Captioner
from contracap.generation.registry import build_strategy
from contracap.generation.word_maps import attention_map, word_maps
from contracap.image_files import decode, to_pillow
from contracap.images import normalise, resize_and_crop
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

SHOWN = 384  # side of the images that the page gets, in pixels
MAX_LABELS = 1000
MAX_CHARACTERS = 65_536  # of the texts of all labels and templates


@dataclass(frozen=True)
class Captioned:
    """A caption with its images for the page.

    Attributes:
        caption: the best text, with its alternatives.
        seen: the image as far as the model sees it.
        words: the caption's words in their order, each with its heat map over `seen`.
    """

    caption: Caption
    seen: Image.Image
    words: tuple[tuple[str, Image.Image], ...]


class Actions:
    """Captions and classes for one image at a time, given as the path of an uploaded file.

    All may be called from several threads: only one at a time gets to the model.

    Raises: ValueError: if the model has no text decoder.
    """

    def __init__(self, model: CoCa, processor: Processor):
        self.model, self.processor = model, processor
        self.captioner = Captioner(model, processor)
        # Captions change the model while they are written, and maps listen to what it puts out.
        self._one_at_a_time = threading.Lock()

    def caption(
        self, path: str | None, strategy: str, settings: Mapping[str, Any] | None = None, prompt: str = ""
    ) -> Captioned:
        """A caption, its alternatives, and where each of its words looked.

        Args:
            strategy: a name of `generation.registry`, with its `settings`.
            prompt: how the caption is to begin; empty for any beginning.

        Raises: ValueError: if there is no image, it cannot be used, or a setting is wrong.
        """
        chosen = build_strategy(strategy, settings or {})
        image = self.read(path)
        pixels = self.pixels(image)
        with self._one_at_a_time:
            caption = self.captioner.generate(pixels, chosen, prompts=prompt)[0]
            maps = attention_map(self.model, pixels, caption.token_ids)
        seen = self.seen(image)
        words = word_maps(self.processor.tokenizer, caption.token_ids, maps)
        return Captioned(caption, to_pillow(seen), tuple((word, overlay(seen, heat)) for word, heat in words))

    @torch.inference_mode()
    def classify(self, path: str | None, labels: str, template: str) -> dict[str, float]:
        """Return the probability of each label, at the model's own temperature.

        Args:
            labels: one a line.
            template: a prompt with {} where the label goes; several, one a line, are averaged.

        Raises: ValueError: if there is no image or no label, a template has no {}, or the image cannot be used.
        """
        names = list(dict.fromkeys(split_lines(labels)))
        if not names:
            raise ValueError("there are no labels: write at least one, each on a line of its own")
        if len(names) > MAX_LABELS:
            raise ValueError(f"there are {len(names)} labels; the page takes {MAX_LABELS}")
        templates = check_templates(split_lines(template))
        if (characters := count_characters(names, templates)) > MAX_CHARACTERS:
            raise ValueError(
                f"the labels have {characters:,} characters in all prompts; the page takes {MAX_CHARACTERS:,}"
            )
        embedding = self.embed(self.pixels(self.read(path)))[0]
        with self._one_at_a_time:
            weights = build_classifier(self.model, self.processor, names, templates)
        _, probabilities = compare_with_labels(embedding, weights, self.model.logit_scale.exp())
        return dict(zip(names, probabilities.tolist(), strict=True))

    @torch.inference_mode()
    def embed(self, pixels: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image embed"]:
        """Contrastive embeddings, unit rows, where the model is."""
        with self._one_at_a_time, evaluating(self.model):
            return require_finite(self.model.encode_image(pixels.to(self.model.device)), "images")

    @torch.inference_mode()
    def embed_text(self, text: str) -> Float[Tensor, "embed"]:
        """A text's contrastive embedding, a unit vector, where the model is."""
        with self._one_at_a_time, evaluating(self.model):
            return embed_texts(self.model, self.processor, [text], 1)[0]

    def read(self, path: str | Path | None) -> UInt8[Tensor, "3 height width"]:
        """An image file's pixels. Errors say its name and not its folder, which is the server's own affair.

        Raises: ValueError: if there is none, or it cannot be used.
        """
        if path is None:
            raise ValueError("there is no image yet: upload one, paste one, or take one with the camera")
        return decode(path, name=Path(path).name)

    def pixels(self, image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "1 3 _ _"]:
        """Return the pixels that the model is fed of an image."""
        return normalise(resize_and_crop(image, self.processor.image_config)[None], self.processor.image_config)

    def seen(self, image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 _ _"]:
        """The part of the image that the model sees, as large as the page shows it."""
        return resize_and_crop(image, replace(self.processor.image_config, size=SHOWN))


def split_lines(text: str) -> list[str]:
    """The lines of a text, without those that are empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]
