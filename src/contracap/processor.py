"""Images and texts to the tensors that a model reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from contracap.download import download
from contracap.image_files import ImageError, decode
from contracap.images import ImageConfig, normalise, resize_and_crop
from contracap.tokenizer import Tokenizer

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, an http(s) URL, the bytes of a file, a Pillow image, or pixels: an array [height, width, 3] or
[height, width], or a tensor [3, height, width] or [1, height, width]; uint8, or floats from 0 to 1."""


class Processor:
    """Prepares images, as in evaluation, and texts for one model."""

    def __init__(self, image: ImageConfig, tokenizer: Tokenizer) -> None:
        self.image_config = image
        self.tokenizer = tokenizer

    def __call__(
        self, *, images: Sequence[ImageSource] | None = None, texts: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of the model: `pixels` of the images, `ids` of the texts.

        `model(**processor(images=[...], texts=[...]))` runs the model.

        Raises: as `images` and `texts` do.
        """
        given = {}
        if images is not None:
            given["pixels"] = self.images(images)
        if texts is not None:
            given["ids"] = self.texts(texts)
        return given

    def images(self, sources: Sequence[ImageSource]) -> Float32[Tensor, "batch 3 height width"]:
        """Return the normalised pixels of images, each an `ImageSource`.

        Raises:
            FileNotFoundError, ImageError, DownloadError: naming the image that is missing or cannot be used.
            TypeError: if `sources` is a single image.
        """
        if isinstance(sources, str | Path | bytes | Image.Image):
            raise TypeError("images() takes a list of images; write images([image]) for one")
        size = self.image_config.size
        pixels = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
        for number, source in enumerate(sources):
            pixels[number] = resize_and_crop(_decode(source, number), self.image_config)
        return normalise(pixels, self.image_config)

    def texts(self, texts: str | Sequence[str]) -> Int64[Tensor, "batch context"]:
        """Return the ids of texts: start, text, end, then zeros."""
        return self.tokenizer(texts)


def _decode(source: ImageSource, number: int) -> UInt8[Tensor, "3 height width"]:
    name = getattr(source, "filename", "") or f"image {number}"
    if isinstance(source, np.ndarray | Tensor):
        return _pixels(source, name)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return decode(download(source), name=source)
    return decode(source, name=str(source) if isinstance(source, str | Path) else name)


def _pixels(source: np.ndarray | Tensor, name: str) -> UInt8[Tensor, "3 height width"]:
    pixels = source.detach().cpu() if isinstance(source, Tensor) else torch.from_numpy(np.array(source))
    if isinstance(source, np.ndarray):
        pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ImageError(
            f"{name}: the shape is {list(source.shape)}; it must be [height, width, 3] of an array, or [3, height, "
            "width] of a tensor"
        )
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ImageError(f"{name}: floats must be from 0 to 1; give uint8 for 0 to 255")
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ImageError(
            f"{name}: pixels are {str(pixels.dtype).removeprefix('torch.')}; give uint8, or floats from 0 to 1"
        )
    return pixels.expand(3, -1, -1)
