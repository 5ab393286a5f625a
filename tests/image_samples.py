"""Images for the tests of decoding and resizing."""

import io

import numpy as np
import torch
from PIL import Image


def scene(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """An image with smooth and rough parts and without symmetry."""
    row, column = np.mgrid[0:height, 0:width]
    colours = [255 * column / width, 255 * row / height, 127 + 127 * np.sin(row * column / 50)]
    pixels = np.stack(colours, axis=2) + np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rows(image: Image.Image) -> torch.Tensor:
    """RGB as [3, height, width]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()
