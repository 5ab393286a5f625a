"""Captions of drawn scenes: many phrasings of one meaning, and the parser that reads any of them back."""

import re
from typing import Any

import numpy as np

from contracap.data.scenes import ATTRIBUTES, COLORS, SHAPES, SIZES, TEXTURES, Relation, Scene, Thing

# Words between two objects, and words before "it": which relation they name, and whether they name it backwards.
RELATION_WORDS: dict[str, tuple[Relation, bool]] = {
    "to the left of": ("left of", False),
    "to the right of": ("left of", True),
    "left of": ("left of", False),
    "right of": ("left of", True),
    "above": ("above", False),
    "over": ("above", False),
    "below": ("above", True),
    "under": ("above", True),
}
IT_WORDS: dict[str, tuple[Relation, bool]] = {
    "to its left": ("left of", False),
    "to its right": ("left of", True),
    "above it": ("above", False),
    "below it": ("above", True),
}
# {a} stands in the relation to {b}.
RELATION_PHRASES = (
    "{a} {relation} {b}",
    "{a} is {relation} {b}",
    "there is {a} {relation} {b}",
    "{relation} {b} is {a}",
    "{relation} {b} there is {a}",
)
IT_PHRASES = ("{b} , {relation} {a}",)
ALONE_PHRASES = ("{a}", "there is {a}")
# Captions that tell one attribute of a single object, which are also prompt templates of zero-shot classification.
COLOR_TEMPLATES = ("a {} thing", "there is a {} thing")
SHAPE_TEMPLATES = ("a {}", "there is a {}")
PLACE_TEMPLATES = ("a thing {}", "there is a thing {}")


def make_caption(scene: Scene, generator: np.random.Generator) -> str:
    """Return a caption that tells everything about the scene, in a random phrasing."""
    if scene.relation is None:
        return _pick(ALONE_PHRASES, generator).format(a=_describe_thing(scene.things[0]))
    backwards = bool(generator.integers(2))
    first, second = (_describe_thing(thing) for thing in scene.things)
    a, b = (second, first) if backwards else (first, second)
    phrase = _pick(RELATION_PHRASES + IT_PHRASES, generator)
    words = IT_WORDS if phrase in IT_PHRASES else RELATION_WORDS
    relation = _pick([word for word, meaning in words.items() if meaning == (scene.relation, backwards)], generator)
    return phrase.format(a=a, b=b, relation=relation)


def make_hint(scene: Scene, generator: np.random.Generator) -> str:
    """Return a caption that tells only the colour, the shape or the place of a single object.

    Places are told in the words for relations. From two objects alone, the decoder would learn these slowly.
    """
    (thing,) = scene.things
    templates, word = (
        (COLOR_TEMPLATES, thing.color),
        (SHAPE_TEMPLATES, thing.shape),
        (PLACE_TEMPLATES, _describe_place(scene, generator)),
    )[generator.integers(3)]
    return _pick(templates, generator).format(word)


def parse_caption(caption: str) -> Scene | None:
    """Return the scene that a caption describes, or None if it is not a complete sentence of this grammar.

    Case, spacing and a final full stop do not matter; a texture may stand before the colour or after it, and one that
    is not mentioned is plain.
    """
    text = " ".join(re.sub(r"([,;.])", r" \1 ", caption.lower()).split()).removesuffix(" .")
    for pattern, words in _PATTERNS:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            a = _read_thing(found, "a")
            if words is None:
                return Scene((a,))
            relation, backwards = words[found["relation"]]
            b = _read_thing(found, "b")
            return Scene((b, a) if backwards else (a, b), relation)
    return None


def _pick(choices: Any, generator: np.random.Generator) -> str:
    return choices[generator.integers(len(choices))]


def _describe_thing(thing: Thing) -> str:
    return "a " + " ".join(getattr(thing, attribute) for attribute in ATTRIBUTES)


def _describe_place(scene: Scene, generator: np.random.Generator) -> str:
    if scene.place is None:
        return "in the middle"
    words = [word for word, meaning in RELATION_WORDS.items() if meaning == scene.place]
    return f"{_pick(words, generator)} the middle"


def _read_thing(found: dict[str, Any], name: str) -> Thing:
    texture = found[f"{name}_texture"] or found[f"{name}_before"] or "plain"
    return Thing(texture=texture, **{word: found[f"{name}_{word}"] for word in ("size", "color", "shape")})


def _thing_pattern(name: str) -> str:
    """Return a pattern of size, colour and shape, with an optional texture before or after the colour."""
    size, texture, color, shape = ("|".join(words) for words in (SIZES, TEXTURES, COLORS, SHAPES))
    return (
        rf"a (?P<{name}_size>{size}) (?:(?P<{name}_before>{texture}) )?(?P<{name}_color>{color}) "
        rf"(?({name}_before)|(?:(?P<{name}_texture>{texture}) )?)(?P<{name}_shape>{shape})"
    )


def _patterns() -> list[tuple[re.Pattern[str], dict[str, tuple[Relation, bool]] | None]]:
    patterns = list[tuple[re.Pattern[str], dict[str, tuple[Relation, bool]] | None]]()
    groups = ((ALONE_PHRASES, None), (RELATION_PHRASES, RELATION_WORDS), (IT_PHRASES, IT_WORDS))
    for phrases, words in groups:
        relation = f"(?P<relation>{'|'.join(words or ())})"
        for phrase in phrases:
            pattern = phrase.format(a=_thing_pattern("a"), b=_thing_pattern("b"), relation=relation)
            patterns.append((re.compile(pattern), words))
    return patterns


_PATTERNS = _patterns()
