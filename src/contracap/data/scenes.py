"""A world of drawn scenes: what a scene is, how one is drawn at random, and which colour-shape pairs are held out.

A scene holds one or two objects. An object has a size, a texture, a colour and a shape; two stand in a relation.
No training scene contains a held-out pair, yet every colour and every shape is trained on. Every test scene contains
one: of two objects at least one, and a single object always.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, get_args

import numpy as np

Size = Literal["small", "large"]
Texture = Literal["plain", "striped"]
Color = Literal["red", "blue", "green", "purple", "yellow", "pink", "orange", "white"]
Shape = Literal["circle", "square", "triangle", "star", "cross", "heart"]
Relation = Literal["left of", "above"]
Attribute = Literal["size", "color", "texture", "shape"]  # in the order in which a caption names them

SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
COLORS: tuple[Color, ...] = get_args(Color)
SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
PLACES: tuple[tuple[Relation, bool] | None, ...] = (None, *product(RELATIONS, (False, True)))

# One sixth of all pairs: each colour is held out in one shape. Where a shape is held out in two colours, exchanging
# the colours of two objects turns one held-out pair into another, so that a test scene has a colour-swapped twin that
# is a test scene too.
HELD_OUT_COLORS: dict[Shape, tuple[Color, ...]] = {
    "circle": ("red", "blue"),
    "square": ("green",),
    "triangle": ("yellow",),
    "star": ("orange", "white"),
    "cross": ("purple",),
    "heart": ("pink",),
}
PAIRS: frozenset[tuple[Color, Shape]] = frozenset(product(COLORS, SHAPES))
HELD_OUT: frozenset[tuple[Color, Shape]] = frozenset(
    (color, shape) for shape, colors in HELD_OUT_COLORS.items() for color in colors
)
TRAINED: frozenset[tuple[Color, Shape]] = PAIRS - HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object."""

    size: Size
    texture: Texture
    color: Color
    shape: Shape

    @property
    def pair(self) -> tuple[Color, Shape]:
        """Colour and shape, which are held out together or not at all."""
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """The meaning of an image or of a caption, in whichever words.

    Of two objects the first is `relation` the second; "right of" and "below" are the same relations read backwards.

    Attributes:
        place: of a single object, its relation to the middle of the image, and whether that is read backwards; None
            in the middle. Scenes that differ in it alone are equal.
    """

    things: tuple[Thing, ...]
    relation: Relation | None = None
    place: tuple[Relation, bool] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2) or (len(self.things) == 2) != (self.relation is not None):
            raise ValueError(f"a scene has one object, or two and a relation; got {self.things} and {self.relation!r}")

    @property
    def pairs(self) -> frozenset[tuple[Color, Shape]]:
        """Colour-shape pairs in the scene."""
        return frozenset(thing.pair for thing in self.things)


def count_meanings() -> int:
    """Return the number of different scenes of two objects, held-out pairs included."""
    things = len(SIZES) * len(TEXTURES) * len(COLORS) * len(SHAPES)
    return things * (things - 1) * len(RELATIONS)


def random_scene(generator: np.random.Generator, pairs: frozenset[tuple[Color, Shape]], *, objects: int) -> Scene:
    """Draw a scene of one or two different `objects`, whose colours and shapes come from `pairs` with equal chance."""
    things = list[Thing]()
    choices = sorted(pairs)
    while len(things) < objects:
        color, shape = choices[generator.integers(len(choices))]
        size, texture = SIZES[generator.integers(len(SIZES))], TEXTURES[generator.integers(len(TEXTURES))]
        thing = Thing(size=size, texture=texture, color=color, shape=shape)
        if thing not in things:
            things.append(thing)
    if objects == 1:
        return Scene(tuple(things), place=PLACES[generator.integers(len(PLACES))])
    return Scene(tuple(things), RELATIONS[generator.integers(len(RELATIONS))])


def make_twin(scene: Scene, attribute: Attribute) -> Scene:
    """Return the scene with one `attribute` exchanged between its two objects."""
    first, second = scene.things
    swapped = (
        replace(first, **{attribute: getattr(second, attribute)}),
        replace(second, **{attribute: getattr(first, attribute)}),
    )
    return Scene(swapped, scene.relation)


def legal_twins(scene: Scene, *, test: bool) -> dict[Attribute, Scene]:
    """Return the attribute-swapped twins with another meaning that are test scenes, or training scenes."""
    if len(scene.things) < 2:
        return {}
    twins = {attribute: make_twin(scene, attribute) for attribute in ATTRIBUTES}
    return {attribute: other for attribute, other in twins.items() if other != scene and is_test(other) == test}


def is_test(scene: Scene) -> bool:
    """Return whether the scene has a held-out pair, which no training scene has."""
    return not scene.pairs.isdisjoint(HELD_OUT)


def training_scenes(generator: np.random.Generator, *, alone: float = 0.3, twinned: float = 0.5) -> Iterator[Scene]:
    """Yield endless scenes without a held-out pair.

    Args:
        generator: the only source of chance.
        alone: probability of a scene with a single object.
        twinned: probability that a scene of two objects is followed by one of its attribute-swapped twins.
    """
    while True:
        scene = random_scene(generator, TRAINED, objects=1 if generator.random() < alone else 2)
        yield scene
        twins = legal_twins(scene, test=False)
        if twins and generator.random() < twinned:
            yield twins[sorted(twins)[generator.integers(len(twins))]]


def single_scenes(generator: np.random.Generator, count: int) -> list[Scene]:
    """Draw test scenes of one object; every held-out pair comes (nearly) equally often."""
    pairs = sorted(HELD_OUT)
    return [random_scene(generator, frozenset({pairs[i % len(pairs)]}), objects=1) for i in range(count)]


def twin_scenes(generator: np.random.Generator, count: int) -> list[Scene]:
    """Draw test scenes of two objects, all different in meaning, in pairs: a scene and its twin.

    The swapped attributes take turns: size, colour, texture, shape.

    Raises:
        ValueError: if the count is odd.
    """
    if count % 2:
        raise ValueError(f"scenes and their twins come in pairs: the count must be even, not {count}")
    scenes = dict[Scene, None]()
    while len(scenes) < count:
        attribute = ATTRIBUTES[len(scenes) // 2 % len(ATTRIBUTES)]
        scene = random_scene(generator, PAIRS, objects=2)
        other = legal_twins(scene, test=True).get(attribute)
        if is_test(scene) and other is not None and scene not in scenes and other not in scenes:
            scenes |= {scene: None, other: None}
    return list(scenes)
