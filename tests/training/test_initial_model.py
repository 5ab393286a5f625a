"""The model before its first step: which weights come from where."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap import save
from contracap.config import ConfigError, build
from contracap.pretrained import random_model, save_open_clip
from contracap.pretrained.errors import WeightsError
from contracap.training.initial_model import initial_model
from contracap.training.recipe import Recipe
from tests.model.tiny_models import tiny_clip

# A CLIP reads one token more than a CoCa, whose class token comes after the text.
CLIP = replace(tiny_clip(), text=replace(tiny_clip().text, context=tiny_clip().text.context + 1))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder of a CLIP whose encoders have the widths of `tiny`."""
    model, processor = random_model(CLIP, seed=5)
    save_open_clip(tmp_path / "clip", model=CLIP, image=processor.image_config, state=model.state_dict())
    return tmp_path / "clip"


def test_a_coca_starts_from_the_encoders_of_a_clip(recipe_values: dict, clip: Path, caplog) -> None:
    recipe = build(Recipe, recipe_values | {"initialise_parts": {"vision": str(clip), "text": str(clip)}})
    with caplog.at_level(logging.INFO):
        model, _ = initial_model(recipe)
    theirs = random_model(CLIP, seed=5)[0].state_dict()
    random = random_model(recipe.model_config, seed=recipe.seed)[0].state_dict()
    for name, tensor in model.state_dict().items():
        from_clip = name.startswith(("vision.", "text.")) and name != "text.class_token"
        assert torch.equal(tensor, (theirs if from_clip else random)[name]), name
    assert caplog.messages[-1] == "random weights: logit_scale, pooler, text.class_token, decoder"
    assert f"vision from {clip}" in caplog.text


def test_parts_replace_those_of_the_whole(recipe_values: dict, weights: Path, tmp_path: Path) -> None:
    other, processor = random_model(build(Recipe, recipe_values).model_config, seed=9)
    save(tmp_path / "other.safetensors", other, processor)
    parts = {"initialise_parts": {"decoder.cross_blocks": str(tmp_path / "other.safetensors")}}
    model, _ = initial_model(build(Recipe, recipe_values | {"initialise_from": str(weights)} | parts))
    whole, _ = initial_model(build(Recipe, recipe_values | {"initialise_from": str(weights)}))
    different = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, whole.state_dict()[name])
    }
    assert different and all(name.startswith("decoder.cross_blocks.") for name in different)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("visoin", {}, "the model has no weights of 'visoin'; did you mean 'vision'"),
        ("decoder", {}, ".*clip.* has no weights of 'decoder'; its parts are"),
        ("vision", {"vision": {"activation": "quick_gelu"}}, 'set model.vision.activation = "gelu"'),
        ("vision", {"vision": {"layers": 1}}, "set model.vision.layers = 2"),
        ("text", {"text": {"layers": 3}}, "set model.text.layers = 2"),
        ("vision", {"vision": {"heads": 4}}, "set model.vision.heads = 2"),
        ("text", {"text": {"context": 12}}, r"text\..* of .*clip.* is \[.*set model.text.context = 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    recipe_values: dict, clip: Path, part: str, change: dict, message: str
) -> None:
    recipe = build(Recipe, recipe_values | {"model": change, "initialise_parts": {part: str(clip)}})
    with pytest.raises(WeightsError, match=message):
        initial_model(recipe)


def test_a_part_needs_the_name_of_its_weights(recipe_values: dict) -> None:
    for part, name in (("vision", " "), ("", "weights")):
        with pytest.raises(ConfigError, match=f"initialise_parts: .* not {part!r} = {name!r}"):
            build(Recipe, recipe_values | {"initialise_parts": {part: name}})
