"""Drawn scenes as images, and tar shards of them: a data set that needs no download."""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from contracap.data.grammar import make_caption, make_hint
from contracap.data.scenes import Color, Scene, Shape, Size, Thing, training_scenes
from contracap.data.shards import write_shard
from contracap.data.workers import in_processes
from contracap.progress import progress_bar

SHARD_SCENES = 2000
TRAINING_CAPTIONS = 4
OVERSAMPLING = 3
# Objects stand in the fields of a board with this many rows and columns. A field is a patch of the quickstart's vision
# transformer: free places would take a model longer to learn than its few minutes.
BOARD = 3
# Lengths are shares of the image's side. Half the side of the square around an object, before 5 % of jitter:
RADII: dict[Size, float] = {"small": 0.105, "large": 0.145}
JITTER = 0.015
# Width of the dark line around an object. Without it, a small model tells shapes by their colours, and fails on unseen
# pairs.
OUTLINE = 0.025
# Distance and width of the stripes.
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
    """Draw training scenes into tar shards, with a process for each core. The shards depend on the arguments only.

    Args:
        folder: made if need be.
        count: number of scenes; twins are neighbours in a shard.
        size: side of the images in pixels.
        seed: of scenes, images and captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, SHARD_SCENES)
    jobs = [
        (folder / f"{number:06d}.tar", min(SHARD_SCENES, count - start), size, (seed, number))
        for number, start in enumerate(starts)
    ]
    workers = min(len(jobs), os.cpu_count() or 1)
    with progress_bar(total=count, unit=" scenes", desc="drawing") as bar:
        for drawn in in_processes(_write_training_shard, jobs, workers):
            bar.update(drawn)


def _write_training_shard(job: tuple[Path, int, int, tuple[int, int]]) -> int:
    """Draw the shard of a job: path, number of scenes, size and seed. Return the number of scenes."""
    path, count, size, seed = job
    generator = np.random.default_rng(seed)
    scenes = islice(training_scenes(generator), count)
    write_shard(path, scene_records(scenes, generator, size=size, captions=TRAINING_CAPTIONS))
    return count


def draw_scene(scene: Scene, generator: np.random.Generator, *, size: int) -> Image.Image:
    """Draw a scene in `size` x `size` pixels; background, places and exact sizes are random."""
    canvas = _background(generator).resize((size * OVERSAMPLING,) * 2, Image.Resampling.BILINEAR)
    for thing, centre in zip(scene.things, _places(scene, generator), strict=True):
        radius = RADII[thing.size] * generator.uniform(0.95, 1.05)
        _draw_thing(canvas, thing, radius * canvas.width, centre * canvas.width, generator)
    return canvas.reduce(OVERSAMPLING)


def scene_records(
    scenes: Iterable[Scene], generator: np.random.Generator, *, size: int, captions: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield shard records: a PNG of `size` pixels, and JSON with the scene and `captions` phrasings of it.

    Of four captions of a single object, the first tells everything; the others tell its colour, its shape or its place.
    """
    for index, scene in enumerate(scenes):
        alone = scene.relation is None
        texts = [
            make_hint(scene, generator) if alone and i % 4 else make_caption(scene, generator) for i in range(captions)
        ]
        fields = {"captions": texts, "scene": asdict(scene)}
        image = io.BytesIO()
        draw_scene(scene, generator, size=size).save(image, "png", compress_level=1)
        yield f"{index:06d}", {"png": image.getvalue(), "json": json.dumps(fields).encode()}


def _background(generator: np.random.Generator) -> Image.Image:
    """Draw the four corners of a pale, greyish gradient."""
    base = generator.uniform(120, 190) + generator.uniform(-12, 12, size=3)
    corners = base + generator.uniform(-15, 15, size=(2, 2, 1))
    return Image.fromarray(corners.clip(0, 255).astype(np.uint8), "RGB")


def _places(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """Return centres (x, y), in shares of the side: in the middle of the board's fields, up to `JITTER` off.

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
    """Draw horizontal dark stripes from the middle outwards, as wide on small objects as on large ones."""
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
    """Return the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the square."""
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
