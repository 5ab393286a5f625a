"""A tiny model, shards of noise, and what the model says of them without a run."""

from pathlib import Path

import pyarrow.parquet as pq

from contracap.apps.bulk.parts import part_name
from contracap.data.shards import write_shard
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, save
from contracap.processor import Processor
from tests.apps.bulk.conftest import picture


def write_shards(folder: Path, shards: int, samples: int) -> list[str]:
    """Shards whose images all differ, by name."""
    for number in range(shards):
        records = [(f"{number}-{i:03}", {"jpg": picture(number * samples + i)}) for i in range(samples)]
        write_shard(folder / f"{number:03}.tar", records)
    return sorted(map(str, folder.iterdir()))


def write_weights(path: Path) -> tuple[CoCa, Processor]:
    model, processor = random_model(SIZES["tiny"], seed=0)
    save(path, model, processor)
    return model, processor


def rows(folder: Path, shard: str) -> list[dict]:
    """Of a shard's part."""
    return pq.read_table(folder / part_name(shard)).to_pylist()
