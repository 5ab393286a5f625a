"""Positions of image tokens, interpolated to another image size."""

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

POOLER_POSITIONS = ("pooler.pool.position", "pooler.caption_pool.position")
IMAGE_POSITIONS = ("vision.position", *POOLER_POSITIONS)  # a row for each image token, the class token's first


def interpolate_positions(state: Mapping[str, Tensor], *, patches: int) -> dict[str, Tensor]:
    """Return the weights with the positions of the patches resized, bicubic, to a square grid of `patches`.

    The position of the class token, which comes first, is kept.
    """
    return {
        name: _interpolate(tensor, patches=patches) if name in IMAGE_POSITIONS else tensor
        for name, tensor in state.items()
    }


def _interpolate(position: Tensor, *, patches: int) -> Tensor:
    old, new = math.isqrt(len(position) - 1), math.isqrt(patches)
    if old == new:
        return position
    grid = rearrange(position[1:].float(), "(row column) width -> 1 width row column", row=old)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], rearrange(grid, "1 width row column -> (row column) width").to(position.dtype)])
