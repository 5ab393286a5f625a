"""A heat map over an image."""

from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from contracap.image_files import to_pillow

# From cold to hot, evenly spaced: dark where nothing was looked at, light where most was; also told apart without hue.
COLORS = torch.tensor([[13, 8, 60], [110, 20, 120], [205, 60, 90], [248, 145, 40], [252, 250, 165]]) / 255
COLD_OPACITY, HOT_OPACITY = 0.5, 0.75


def overlay(image: UInt8[Tensor, "3 height width"], heat: Float[Tensor, "row column"]) -> Image.Image:
    """The image under its heat map, whose least value is coldest and whose greatest is hottest."""
    heat = heat - heat.min()
    heat = heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)
    heat = interpolate(heat[None, None], size=image.shape[1:], mode="bicubic")[0].clamp(0, 1)
    opacity = COLD_OPACITY + (HOT_OPACITY - COLD_OPACITY) * heat
    mixed = (1 - opacity) * image / 255 + opacity * to_colors(heat[0])
    return to_pillow((mixed * 255).round().to(torch.uint8))


def to_colors(heat: Float[Tensor, "height width"]) -> Float[Tensor, "3 height width"]:
    """The colour of each value from 0 to 1."""
    place = heat * (len(COLORS) - 1)
    channels = torch.zeros(3, *heat.shape)
    for number, (low, high) in enumerate(pairwise(COLORS)):
        inside = (place >= number) & ((place < number + 1) | (number == len(COLORS) - 2))
        mixed = low[:, None, None] + (place - number) * (high - low)[:, None, None]
        channels = torch.where(inside, mixed, channels)
    return channels
