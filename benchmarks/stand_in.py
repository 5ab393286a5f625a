"""Images and captions that stand in for Flickr8k where it is not at hand: of the same sizes and lengths."""

import io
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from contracap.data.shards import write_shard

IMAGE_SIZE, QUALITY = (500, 375), 90
SHARDS, CAPTIONS = 4, 5  # captions of an image
# How many of Flickr8k's captions have 4, 5, 6, ... tokens, start and end included.
TOKENS = range(4, 31)
COUNTS = (8, 24, 132, 366, 855, 1794, 2413, 2666, 3129, 3094, 3090, 2740, 2431, 1937, 1492, 1061, 786, 610, 419, 293)
COUNTS += (192, 144, 89, 78, 52, 33, 25)
# Each is one token.
WORDS = "a and ball beach black blue boy brown child dog down field girl grass green group in is jumping man men of on "
WORDS += "orange people playing red running sitting snow standing street the through to tree two walking water white"


def write_flickr8k(folder: Path, *, images: int, seed: int = 0) -> None:
    """Write shards in the layout of Flickr8k's training split into `folder`/flickr8k/train."""
    drawn, captions = draw_images(images, seed=seed), make_captions(seed=seed)
    for number in range(SHARDS):
        members = (
            {"jpg": jpeg, "json": json.dumps({"captions": list(islice(captions, CAPTIONS))}).encode()}
            for jpeg in islice(drawn, images // SHARDS)
        )
        records = ((f"{number}-{row:05}", each) for row, each in enumerate(members))
        write_shard(folder / "flickr8k" / "train" / f"{number:06}.tar", records)


def draw_images(images: int, *, seed: int) -> Iterator[bytes]:
    """Yield JPEG images of smooth random colours with some grain."""
    generator = np.random.default_rng(seed)
    for _ in range(images):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(IMAGE_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-8, 9, smooth.shape, dtype=np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(
            file := io.BytesIO(), "JPEG", quality=QUALITY
        )
        yield file.getvalue()


def make_captions(*, seed: int) -> Iterator[str]:
    """Yield random words without end, as many a text as Flickr8k's captions have tokens."""
    chooser = random.Random(seed)
    while True:
        (tokens,) = chooser.choices(TOKENS, COUNTS)
        yield " ".join(chooser.choices(WORDS.split(), k=tokens - 2))
