"""Drawn scenes: the captions mean what they say, held-out pairs stay out, and a seed draws the same images."""

import json
from dataclasses import replace
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
import pytest

from contracap.data.drawing import draw_scene, scene_records, write_training_shards
from contracap.data.grammar import (
    ALONE_PHRASES,
    IT_PHRASES,
    IT_WORDS,
    RELATION_PHRASES,
    RELATION_WORDS,
    make_caption,
    make_hint,
    parse_caption,
)
from contracap.data.loader import evaluation_samples
from contracap.data.scenes import (
    COLORS,
    HELD_OUT,
    PAIRS,
    SHAPES,
    SIZES,
    TEXTURES,
    TRAINED,
    Scene,
    Thing,
    count_meanings,
    is_test,
    legal_twins,
    make_twin,
    random_scene,
    single_scenes,
    training_scenes,
    twin_scenes,
)

CIRCLE = Thing(size="small", texture="plain", color="red", shape="circle")
SQUARE = Thing(size="large", texture="striped", color="blue", shape="square")


def test_every_phrasing_is_read_back_to_its_meaning() -> None:
    a, b = "a small red plain circle", "a large blue striped square"
    for phrases, words in ((RELATION_PHRASES, RELATION_WORDS), (IT_PHRASES, IT_WORDS)):
        for phrase, (word, (relation, backwards)) in product(phrases, words.items()):
            expected = Scene((SQUARE, CIRCLE) if backwards else (CIRCLE, SQUARE), relation)
            assert parse_caption(phrase.format(a=a, b=b, relation=word)) == expected
    for phrase in ALONE_PHRASES:
        assert parse_caption(phrase.format(a=b)) == Scene((SQUARE,))


@pytest.mark.parametrize("objects", [1, 2])
def test_described_scenes_are_read_back(objects: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(generator, TRAINED | HELD_OUT, objects=objects)
        assert parse_caption(make_caption(scene, generator)) == scene


def test_inverse_relations_say_the_same() -> None:
    circle, square = "a small red plain circle", "a large blue striped square"
    assert parse_caption(f"{circle} above {square}") == parse_caption(f"A{square[1:]}  is below {circle}.") is not None
    assert parse_caption(f"{circle} left of {square}") == parse_caption(f"{circle}, to its right {square}") is not None
    assert parse_caption(f"{circle} left of {square}") != parse_caption(f"{circle} right of {square}")
    # A texture may come first, and plain may go unsaid.
    assert parse_caption("a small red circle above a large striped blue square") == Scene((CIRCLE, SQUARE), "above")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a small red plain circle above",
        "a small red plain circle above a large blue plain square above a small red plain star",
        "a large blue striped striped square",
        "a small red red plain circle",
        "a small crimson plain circle",
    ],
)
def test_incomplete_or_foreign_captions_have_no_meaning(caption: str) -> None:
    assert parse_caption(caption) is None


def test_a_hint_tells_no_whole_scene() -> None:
    generator = np.random.default_rng(0)
    hints = {make_hint(Scene((CIRCLE,)), generator) for _ in range(50)}
    assert len(hints) > 2
    assert all(parse_caption(words) is None for words in hints)
    assert all(("red" in words) + ("circle" in words) + ("in the middle" in words) == 1 for words in hints)
    left = {make_hint(Scene((CIRCLE,), place=("left of", False)), generator) for _ in range(50)}
    assert "a thing left of the middle" in left and "there is a thing to the left of the middle" in left


def test_training_scenes_and_captions_hold_no_held_out_pair_yet_every_colour_and_shape() -> None:
    generator = np.random.default_rng(0)
    scenes = list(islice(training_scenes(generator), 1500))
    pairs = frozenset().union(*(scene.pairs for scene in scenes))
    assert not pairs & HELD_OUT
    for held in (pairs, HELD_OUT):
        assert {color for color, _ in held} == set(COLORS) and {shape for _, shape in held} == set(SHAPES)
    for scene in scenes[:500]:
        told = parse_caption(make_caption(scene, generator))
        assert told is not None and not told.pairs & HELD_OUT


def test_the_world_is_as_large_as_promised() -> None:
    assert (len(SHAPES) >= 6, len(COLORS) >= 8, len(SIZES) == 2, len(TEXTURES) >= 2) == (True,) * 4
    relations = {meaning for words in (RELATION_WORDS, IT_WORDS) for meaning in words.values()}
    assert relations == set(product(("left of", "above"), (False, True)))  # 4: and their inverses
    things = len(SHAPES) * len(COLORS) * len(SIZES) * len(TEXTURES)
    assert count_meanings() == 2 * things * (things - 1)


def test_training_scenes_are_followed_by_some_of_their_twins() -> None:
    scenes = list(islice(training_scenes(np.random.default_rng(0)), 500))
    followed = sum(later in legal_twins(scene, test=False).values() for scene, later in pairwise(scenes))
    assert 100 < followed < 250


def test_a_twin_exchanges_one_attribute() -> None:
    scene = Scene((CIRCLE, SQUARE), "above")
    assert make_twin(scene, "color") == Scene((replace(CIRCLE, color="blue"), replace(SQUARE, color="red")), "above")
    assert make_twin(make_twin(scene, "shape"), "shape") == scene
    assert legal_twins(Scene((CIRCLE,)), test=True) == legal_twins(Scene((CIRCLE,)), test=False) == {}


def test_legal_twins_mean_something_else_and_stay_on_their_side() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        scene = random_scene(generator, PAIRS, objects=2)
        training, test = legal_twins(scene, test=False), legal_twins(scene, test=True)
        assert scene not in [*training.values(), *test.values()]
        assert all(other.pairs <= TRAINED for other in training.values())
        assert all(other.pairs & HELD_OUT for other in test.values())
        first, second = scene.things
        assert ("size" in training or "size" in test) == (
            first.size != second.size and make_twin(scene, "size") != scene
        )


def test_test_scenes_are_distinct_hold_a_held_out_pair_and_lie_beside_their_twins() -> None:
    scenes = twin_scenes(np.random.default_rng(0), 60)
    assert len(set(scenes)) == len(scenes) == 60
    assert all(is_test(scene) and scene.pairs & HELD_OUT for scene in scenes)
    for scene, other in zip(scenes[::2], scenes[1::2], strict=True):
        assert other in legal_twins(scene, test=True).values()
    with pytest.raises(ValueError, match="even"):
        twin_scenes(np.random.default_rng(0), 3)


def test_single_test_scenes_cover_every_held_out_pair() -> None:
    scenes = single_scenes(np.random.default_rng(0), 2 * len(HELD_OUT))
    assert frozenset().union(*(scene.pairs for scene in scenes)) == HELD_OUT
    assert all(len(scene.things) == 1 for scene in scenes)


def test_a_scene_of_two_objects_needs_a_relation() -> None:
    for things, relation in (((CIRCLE, SQUARE), None), ((CIRCLE,), "above"), ((), None)):
        with pytest.raises(ValueError, match="a scene has one object, or two and a relation"):
            Scene(things, relation)


def test_a_picture_depends_on_the_seed_alone() -> None:
    scene = Scene((CIRCLE, SQUARE), "above")
    first, again, other = (draw_scene(scene, np.random.default_rng(seed), size=64) for seed in (3, 3, 4))
    assert (first.size, first.mode) == ((64, 64), "RGB")
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("relation", ["left of", "above"])
def test_objects_are_drawn_in_their_colours_where_the_relation_puts_them(relation) -> None:
    circle, square = replace(CIRCLE, size="large"), replace(SQUARE, texture="plain")
    for seed in range(8):
        picture = draw_scene(Scene((circle, square), relation), np.random.default_rng(seed), size=64)
        red, green, blue = np.moveaxis(np.asarray(picture, dtype=int), 2, 0)
        circle_at, square_at = (
            np.argwhere(mask).mean(axis=0)[::-1] for mask in (red > green + blue, (blue > 150) & (red < 80))
        )
        across, down = square_at - circle_at
        assert (across > 2 * abs(down) - 3) if relation == "left of" else (down > 2 * abs(across) - 3)


def test_shards_are_the_same_whoever_draws_them(tmp_path: Path) -> None:
    write_training_shards(tmp_path / "first", 30, size=16, seed=5)
    write_training_shards(tmp_path / "again", 30, size=16, seed=5)
    write_training_shards(tmp_path / "other", 30, size=16, seed=6)
    first, again, other = ((tmp_path / name / "000000.tar").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    for sample in evaluation_samples(tmp_path / "first"):
        assert len(sample.captions) > 1
        for caption in sample.captions:
            told = parse_caption(caption)
            assert told is None or json.loads(json.dumps(sample.fields["scene"]))["relation"] == told.relation


def test_records_hold_a_picture_and_its_captions() -> None:
    scene = Scene((CIRCLE, SQUARE), "left of")
    ((key, members),) = scene_records([scene], np.random.default_rng(0), size=32, captions=3)
    fields = json.loads(members["json"])
    assert key == "000000"
    assert members["png"].startswith(b"\x89PNG")
    assert [parse_caption(caption) for caption in fields["captions"]] == [scene] * 3
    assert fields["scene"]["things"][0] == {"size": "small", "texture": "plain", "color": "red", "shape": "circle"}
