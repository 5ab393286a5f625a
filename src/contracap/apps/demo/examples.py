"""First contents of the page: labels that suit the model, and images to try."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from contracap.apps.demo.actions import SHOWN, Actions
from contracap.apps.demo.collection import Collection
from contracap.apps.demo.uploads import Uploads
from contracap.data.drawing import draw_scene
from contracap.data.grammar import COLOR_TEMPLATES
from contracap.data.scenes import COLORS, single_scenes, twin_scenes
from contracap.evaluation.class_names import TEMPLATE
from contracap.image_files import make_thumbnail
from contracap.model.sizes import SIZES

EXAMPLES = 4
LABELS = ("dog", "cat", "bird", "horse", "person", "child", "car", "boat", "beach", "street")
LARGEST = 768  # pixels a side
TRIES = 3 * EXAMPLES  # images of a folder that are opened, for some may be unreadable


@dataclass(frozen=True)
class Examples:
    """Labels and prompts of the classification, and the paths of images that a visitor can choose."""

    labels: Sequence[str]
    templates: Sequence[str]
    images: Sequence[Path]


def find_examples(actions: Actions, collection: Collection | None, uploads: Uploads) -> Examples:
    """Examples for a model: of its size `scenes` drawn ones, else images of the collection, if there is one."""
    drawn = actions.model.config == SIZES["scenes"]
    labels, templates = (COLORS, COLOR_TEMPLATES) if drawn else (LABELS, (TEMPLATE,))
    found = _of_collection(actions, collection) if collection is not None else _scenes() if drawn else ()
    paths = []
    for name, image in found:
        paths.append(uploads.new_path(uploads.examples, f"{name}.png"))
        image.save(paths[-1])
    return Examples(labels, templates, paths)


def _scenes() -> Iterator[tuple[str, Image.Image]]:
    generator = np.random.default_rng(0)
    scenes = [*single_scenes(generator, EXAMPLES - EXAMPLES // 2), *twin_scenes(generator, EXAMPLES // 2)]
    return ((f"scene {number}", draw_scene(scene, generator, size=SHOWN)) for number, scene in enumerate(scenes, 1))


def _of_collection(actions: Actions, collection: Collection) -> Iterator[tuple[str, Image.Image]]:
    """Images from all over the collection."""
    found = 0
    for path in collection.paths[:: -(-collection.total // TRIES) or 1]:
        try:
            image = make_thumbnail(actions.read(path), LARGEST)
        except (ValueError, OSError):
            continue
        yield path.stem, image
        found += 1
        if found == EXAMPLES:
            break
