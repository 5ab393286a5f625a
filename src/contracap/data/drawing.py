"""Drawn scenes as images, and tar shards of them: a data set that needs no download."""

import io
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from contracap.data.grammar import describe, hint
from contracap.data.scenes import Color, Scene, Shape, Size, Thing, training_scenes
from contracap.data.shards import write_shard
from contracap.progress import progress_bar

SHARD_SCENES = 2000
TRAINING_CAPTIONS = 4
OVERSAMPLING = 3
# Objects stand in the fields of a board of this many rows and columns, which are a vision transformer's patches when it
# cuts the image into as many: free places would take a model longer to learn than the few minutes that it has.
BOARD = 3
# The rest are shares of the image's side. Half the side of the square around an object, before 5 % of jitter:
RADII: dict[Size, float] = {"small": 0.105, "large": 0.145}
JITTER = 0.015
# Width of the dark line around an object. Without it a model of this size reads a shape by its colour, and fails on
# pairs that it has not seen.
OUTLINE = 0.025
# From one stripe to the next, and the width of one.
STRIPES = (0.07, 0.025)
INK = (24, 24, 24)
PAINT: dict[Color, tuple[int, int, int]] = {
    "red": (214, 32, 32),
    "blue": (32, 64, 220),
    "green": (24, 150, 48),
    "purple": (140, 40, 170),
    "yellow": (245, 220, 40),
    "pink": (255, 130, 190),
    "orange": (245, 135, 15),
    "white": (250, 250, 250),
}


def write_training_shards(folder: Path, count: int, *, size: int, seed: int) -> None:
    """Draws `count` training scenes into tar shards, one process a core; the shards depend on the arguments only.

    Args:
        folder: is made if need be.
        count: scenes, two of which are neighbours in a shard if they are twins.
        size: side of the images in pixels.
        seed: of scenes, images and captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, SHARD_SCENES)
    jobs = [
        (folder / f"{number:06d}.tar", min(SHARD_SCENES, count - start), size, (seed, number))
        for number, start in enumerate(starts)
    ]
    # Spawned, not forked: the caller may have threads of torch running, which a fork would leave half dead.
    workers = min(len(jobs), os.cpu_count() or 1)
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        progress_bar(total=count, unit=" scenes", desc="drawing") as bar,
    ):
        for drawn in pool.map(_write_training_shard, *zip(*jobs, strict=True)):
            bar.update(drawn)


def _write_training_shard(path: Path, count: int, size: int, seed: tuple[int, int]) -> int:
    """Draw one shard; return how many scenes it has."""
    generator = np.random.default_rng(seed)
    scenes = islice(training_scenes(generator), count)
    write_shard(path, scene_records(scenes, generator, size=size, captions=TRAINING_CAPTIONS))
    return count


def draw(scene: Scene, generator: np.random.Generator, *, size: int) -> Image.Image:
    """The scene as an image of `size` x `size` pixels; background, places and exact sizes are random."""
    canvas = _background(generator).resize((size * OVERSAMPLING,) * 2, Image.Resampling.BILINEAR)
    for thing, centre in zip(scene.things, _places(scene, generator), strict=True):
        radius = RADII[thing.size] * generator.uniform(0.95, 1.05)
        _draw_thing(canvas, thing, radius * canvas.width, centre * canvas.width, generator)
    return canvas.reduce(OVERSAMPLING)


def scene_records(
    scenes: Iterable[Scene], generator: np.random.Generator, *, size: int, captions: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Shard records: a PNG of `size` pixels, and JSON with the scene and `captions` phrasings of it.

    Of the captions of a single object only the first of every four tells all; the others tell its colour, its shape or
    its place.
    """
    for index, scene in enumerate(scenes):
        alone = scene.relation is None
        texts = [hint(scene, generator) if alone and i % 4 else describe(scene, generator) for i in range(captions)]
        fields = {"captions": texts, "scene": asdict(scene)}
        picture = io.BytesIO()
        draw(scene, generator, size=size).save(picture, "png", compress_level=1)
        yield f"{index:06d}", {"png": picture.getvalue(), "json": json.dumps(fields).encode()}


def _background(generator: np.random.Generator) -> Image.Image:
    """Four corners of a pale, greyish gradient."""
    base = generator.uniform(120, 190) + generator.uniform(-12, 12, size=3)
    corners = base + generator.uniform(-15, 15, size=(2, 2, 1))
    return Image.fromarray(corners.clip(0, 255).astype(np.uint8), "RGB")


def _places(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """Centres (x, y), shares of the side: in the middle of the board's fields, up to `JITTER` off.

    Two objects stand left and right, or above and below, of the middle one; a single object in one of these fields, or
    in the middle.
    """
    middle, last = BOARD // 2, BOARD - 1
    sides = {"left of": [(0, middle), (last, middle)], "above": [(middle, 0), (middle, last)]}
    if scene.relation is not None:
        fields = sides[scene.relation]
    elif scene.place is not None:
        relation, backwards = scene.place
        fields = [sides[relation][backwards]]
    else:
        fields = [(middle, middle)]
    return (np.array(fields) + 0.5) / BOARD + generator.uniform(-JITTER, JITTER, size=(len(fields), 2))


def _draw_thing(
    canvas: Image.Image, thing: Thing, radius: float, centre: np.ndarray, generator: np.random.Generator
) -> None:
    side = round(2 * radius)
    surface = Image.new("RGB", (side, side), _rgb(np.array(PAINT[thing.color]) + generator.uniform(-12, 12, size=3)))
    mask = Image.new("L", (side, side))
    outline = [((x + 1) * radius, (y + 1) * radius) for x, y in OUTLINES[thing.shape]]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    if thing.texture == "striped":
        _draw_stripes(surface, canvas.width)
    ImageDraw.Draw(surface).polygon(outline, outline=INK, width=round(OUTLINE * canvas.width))
    canvas.paste(surface, (round(centre[0] - radius), round(centre[1] - radius)), mask)


def _draw_stripes(surface: Image.Image, width: int) -> None:
    """Horizontal dark stripes from the middle outwards, on the same scale on large and small."""
    pen, side = ImageDraw.Draw(surface), surface.width
    distance, half = STRIPES[0] * width, STRIPES[1] * width / 2
    for away in np.arange(0, side / 2, distance):
        for middle in (side / 2 - away, side / 2 + away):
            pen.rectangle((0, middle - half, side, middle + half), fill=INK)


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.clip(values, 0, 255))
    return red, green, blue


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [((1, 0.42)[i % 2] * math.cos(a), (1, 0.42)[i % 2] * math.sin(a) + 0.05) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    """The usual curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the unit square."""
    turns = [2 * math.pi * i / 48 for i in range(48)]
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(math.sin(t) ** 3, -(y + 2.5) / 14.6) for t, y in zip(turns, heights, strict=True)]


# Outlines in a square from -1 to 1, y downwards.
OUTLINES: dict[Shape, list[tuple[float, float]]] = {
    "circle": [(math.cos(math.pi * i / 24), math.sin(math.pi * i / 24)) for i in range(48)],
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star(),
    "cross": [
        (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36),
        (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36),
    ],
    "heart": _heart(),
}  # fmt: skip
