"""What stands between files and strings on one side and the model on the other."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from contracap.image import ImageConfig, decode, normalise, resize_and_crop
from contracap.tokenizer import Tokenizer


class Processor:
    """Pictures to normalised pixels as evaluation sees them, texts to ids."""

    def __init__(self, image: ImageConfig, tokenizer: Tokenizer) -> None:
        self.image_config = image
        self.tokenizer = tokenizer

    def images(self, sources: Sequence[str | Path | bytes | Image.Image]) -> Float32[Tensor, "batch 3 height width"]:
        """Pixels of pictures given as paths, file contents or Pillow pictures.

        Raises: FileNotFoundError, ImageError: naming the picture that is missing or cannot be used.
        """
        if isinstance(sources, str | Path | bytes | Image.Image):
            raise TypeError("images() takes a list of pictures; write images([picture]) for one")
        size = self.image_config.size
        pixels = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
        for number, source in enumerate(sources):
            picture = decode(source, name=_name(source, number))
            pixels[number] = resize_and_crop(picture, self.image_config)
        return normalise(pixels, self.image_config)

    def texts(self, texts: str | Sequence[str]) -> Int64[Tensor, "batch context"]:
        """Ids of texts: start, text, end, then zeros."""
        return self.tokenizer(texts)


def _name(source: str | Path | bytes | Image.Image, number: int) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return getattr(source, "filename", "") or f"picture {number}"
