"""Configurations of the size `tiny` in every kind."""

from dataclasses import replace

from contracap.model.coca import CoCaConfig
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES

TINY = SIZES["tiny"]
POOLERS = ("shared", "cascade", "parallel")


def with_pooler(kind: str, *, positions: bool = False) -> CoCaConfig:
    return replace(TINY, pooler=replace(TINY.pooler, kind=kind, adds_positions=positions))


def tiny_clip() -> CoCaConfig:
    return replace(
        TINY,
        pooler=PoolerConfig(kind="class_token", queries=0),
        text=replace(TINY.text, pool="end_token"),
        decoder=None,
    )
