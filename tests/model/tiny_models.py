"""Models of the size `tiny` in every kind, and what they read."""

from dataclasses import replace

import torch
from torch import Tensor

from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES

TINY = SIZES["tiny"]
POOLERS_WITH_QUERIES = ("shared", "cascade", "parallel")
POOLERS = (*POOLERS_WITH_QUERIES, "class_token")


def with_pooler(kind: str, *, positions: bool = False) -> CoCaConfig:
    if kind in POOLERS_WITH_QUERIES:
        return replace(TINY, pooler=replace(TINY.pooler, kind=kind, adds_positions=positions))
    vision = replace(TINY.vision, width=TINY.text.width)
    return replace(TINY, embed_dim=24, vision=vision, pooler=PoolerConfig(kind=kind, queries=0))


def tiny_clip() -> CoCaConfig:
    return replace(
        TINY,
        pooler=PoolerConfig(kind="class_token", queries=0),
        text=replace(TINY.text, pool="end_token"),
        decoder=None,
    )


def tiny_mammut(*, pool: str = "mean_with_padding", feed_forward_before_cross: bool = True) -> CoCaConfig:
    decoder = replace(TINY.decoder, shares_blocks=True, cross_every=2)
    return replace(
        TINY,
        pooler=PoolerConfig(kind="mean" if pool == "mean_with_padding" else "mean_of_patches", queries=0),
        text=replace(TINY.text, pool=pool),
        decoder=replace(decoder, feed_forward_before_cross=feed_forward_before_cross),
    )


def perturbed(config: CoCaConfig) -> CoCa:
    """A model in float64 whose gains and biases tell one layer from another."""
    torch.manual_seed(0)
    model = CoCa(config)
    model.initialise()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def texts(*lengths: int) -> Tensor:
    ids = torch.zeros(len(lengths), TINY.text.context, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 0] = TINY.text.end - 1
        ids[row, 1 : length - 1] = torch.arange(1, length - 1) + 10 * row
        ids[row, length - 1] = TINY.text.end
    return ids


def images(count: int) -> Tensor:
    return torch.randn(count, 3, TINY.vision.image_size, TINY.vision.image_size)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()
