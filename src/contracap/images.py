"""Pixels as the model reads them: sizes, crops and normalisation, as the released weights were trained with."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from contracap.image_files import to_tensor

# A longer image, in multiples of its shorter side, loses its far ends before resizing; no centre crop reaches them.
LONGEST_RATIO = 1000


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The preparation of images: from pixels of any size to the square that the model reads."""

    size: int = 224
    """Height and width in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from pixels scaled to 0..1; red, green, blue."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divides what is left; red, green, blue."""
    resize: Literal["shortest", "squash"] = "shortest"
    """`shortest` resizes the shorter side to `size` and crops the centre; `squash` ignores the aspect ratio."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image size is {self.size}; it must be at least 1 pixel")
        if min(self.std) <= 0:
            raise ValueError(f"image std is {self.std}; each must be above 0")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random crops and mirror images for training."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of a crop's width to its height."""
    flip: float = 0.0
    """Probability of a mirror image."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"augmentation crop_scale is {self.crop_scale}; it must be low, high with 0 < low <= high <= 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"augmentation crop_ratio is {self.crop_ratio}; it must be low, high with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation flip is {self.flip}; a probability is 0 to 1")


def resize_and_crop(
    image: UInt8[Tensor, "3 height width"], config: ImageConfig
) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """Return the image as evaluation uses it: resized by `config.resize`, then cropped to its centre.

    Source: sizes and offsets are those of torchvision's Resize and CenterCrop, as in open_clip's evaluation transform.
    """
    size = config.size
    if config.resize == "squash":
        return _resize_exactly(image, size, size)
    height, width = image.shape[1:]
    longest = LONGEST_RATIO * min(height, width)
    image = _centre(image, min(height, longest), min(width, longest))
    height, width = image.shape[1:]
    if width <= height:
        image = _resize_exactly(image, int(size * height / width), size)
    else:
        image = _resize_exactly(image, size, int(size * width / height))
    return _centre(image, size, size).contiguous()


def augment(
    image: UInt8[Tensor, "3 height width"],
    config: ImageConfig,
    augmentation: AugmentationConfig,
    generator: np.random.Generator,
) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """Return a random crop of the image, resized, and mirrored with probability `flip`.

    Source: torchvision's RandomResizedCrop: the area and the logarithm of the aspect ratio are uniform.
    """
    top, left, height, width = random_crop(image.shape[1], image.shape[2], augmentation, generator)
    image = _resize(image[:, top : top + height, left : left + width], config.size, config.size)
    return image.flip(2) if generator.random() < augmentation.flip else image


def normalise(
    pixels: UInt8[Tensor, "batch 3 height width"], config: ImageConfig
) -> Float32[Tensor, "batch 3 height width"]:
    """Return (pixels / 255 - mean) / std, on the device of the pixels."""
    scale, shift = _scale_and_shift(config.mean, config.std, pixels.device)
    return pixels.float().mul_(scale).add_(shift)  # in place: on CPUs fresh memory costs more than the arithmetic


@lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors also serve callers outside of inference mode
        scale = [1 / (255 * deviation) for deviation in std]
        shift = [-centre / deviation for centre, deviation in zip(mean, std, strict=True)]
        values = torch.tensor([scale, shift], dtype=torch.float32, device=device)
    return values[0].reshape(3, 1, 1), values[1].reshape(3, 1, 1)


def _resize(
    image: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    """Resize as Pillow does: bicubic, antialiased, in uint8. The float path does not round between its two passes."""
    if image.shape[1:] == (height, width):
        return image.contiguous()
    resized = interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)
    return resized[0].contiguous()


def _resize_exactly(
    image: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    """Resize as `_resize` does, but with Pillow if a side grows, or shrinks to more than 5/8.

    There torch's 16-bit weights leave one value in a million off by 2. Such images are small, so it takes little
    time.
    """
    sides = ((image.shape[1], height), (image.shape[2], width))
    if all(before == after or before >= 1.6 * after for before, after in sides):
        return _resize(image, height, width)
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(np.array(pixels))


def _centre(
    image: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    top = round((image.shape[1] - height) / 2)  # to the even number at one half, as torchvision does
    left = round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def random_crop(
    height: int, width: int, augmentation: AugmentationConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop; after 10 that do not fit, the largest one in the centre."""
    low, high = augmentation.crop_ratio
    for _ in range(10):
        area = height * width * generator.uniform(*augmentation.crop_scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < low:
        crop_height = min(height, max(1, round(width / low)))
    elif width / height > high:
        crop_width = min(width, max(1, round(height * high)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
