"""The model before its first step: random, from a file of weights, or with parts from other files."""

import json
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from operator import attrgetter

import torch

from contracap.images import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.onednn import use_onednn
from contracap.pretrained import random_model, read_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.positions import interpolate_positions
from contracap.pretrained.shapes import meta_state, require_same_keys, shapes_of
from contracap.pretrained.weights import Weights
from contracap.training.recipe import Recipe

# Settings that change what the weights of a part compute, but not their shapes.
SETTINGS = {
    "vision": ("vision.activation", "vision.heads"),
    "text": ("text.activation", "text.heads", "text.pool"),
    "pooler": ("pooler.kind", "pooler.heads"),
    "decoder": ("text.activation", "decoder.heads"),
}

logger = logging.getLogger(__name__)


def initial_model(recipe: Recipe) -> tuple[CoCa, ImageConfig]:
    """Return the model before its first step, and the images that it takes. Logs where its weights come from.

    Positions are interpolated to the image size of the recipe.

    Raises: WeightsError: if weights are not of the model that the recipe describes.
    """
    if recipe.initialise_from is not None:
        model, image = _load_whole(recipe, recipe.initialise_from)
        read = set(model.state_dict())
    else:
        model, processor = random_model(recipe.model_config, seed=recipe.seed)
        image, read = processor.image_config, set[str]()
    for part, name in recipe.initialise_parts.items():
        weights = read_weights(name, fallback=recipe.model_config)
        read |= _load_part(model, part, weights)
        if part == "vision":
            image = replace(weights.image, size=image.size)
    if recipe.weights:
        logger.info("random weights: %s", _list_others(model, read) or "none")
    return model.requires_grad_(True), image


def _load_whole(recipe: Recipe, name: str) -> tuple[CoCa, ImageConfig]:
    wanted = recipe.model_config
    weights = read_weights(name, fallback=wanted)
    trained = weights.model
    if "cls_mask" not in recipe.model.get("text", {}):  # keep the one that the weights were trained with
        wanted = replace(wanted, text=replace(wanted.text, cls_mask=trained.text.cls_mask))
    keys = [key for keys in SETTINGS.values() for key in keys]
    _require_same_settings(weights, wanted, [key for key in keys if not key.endswith(".heads")])
    fitted = interpolate_positions(weights.state, patches=wanted.vision.patches)
    try:
        require_same_keys(shapes_of(fitted), shapes_of(meta_state(wanted)))
    except WeightsError as error:
        same_context = replace(wanted, text=replace(wanted.text, context=trained.text.context))
        if shapes_of(fitted) == shapes_of(meta_state(same_context)):
            raise WeightsError(
                f"{weights.path} reads texts of {trained.text.context} tokens, the recipe says {wanted.text.context}: "
                f"set model.text.context = {trained.text.context}"
            ) from None
        raise WeightsError(f"{weights.path} is not of size {recipe.size}: {error}") from None
    _require_same_settings(weights, wanted, [key for key in keys if key.endswith(".heads")])
    with torch.device("meta"):
        model = CoCa(wanted)
    model.load_state_dict({name: tensor.float().clone() for name, tensor in fitted.items()}, assign=True)
    use_onednn(model)
    logger.info("weights from %s", weights.path)
    return model, replace(weights.image, size=wanted.vision.image_size)


def _load_part(model: CoCa, part: str, weights: Weights) -> set[str]:
    """Copy the weights whose names start with `part` into the model, and return their names.

    Weights that only the model has stay as they are: the class token of a text encoder that starts from a CLIP.
    """
    ours = {name: tensor for name, tensor in model.state_dict().items() if f"{name}.".startswith(f"{part}.")}
    state = interpolate_positions(weights.state, patches=model.config.vision.patches)
    theirs = {name: state[name] for name in ours if name in state}
    for names, owner, all_names in ((ours, "the model", model.state_dict()), (theirs, weights.path, state)):
        if not names:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in all_names))
            raise WeightsError(f"initialise_parts: {owner} has no weights of {part!r}; its parts are {parts}")
    kind = part.split(".")[0]
    is_clip_text = kind == "text" and weights.model.text.pool == "end_token"  # its end token may become a class token
    _require_same_settings(weights, model.config, SETTINGS.get(kind, ())[: -1 if is_clip_text else None])
    if lost := [name for name in state if f"{name}.".startswith(f"{part}.") and name not in ours]:
        raise WeightsError(
            f"initialise_parts: {part!r} of {weights.path} has {len(lost)} weights that the model of the recipe lacks, "
            f"such as {lost[0]}"
        )
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise WeightsError(
                f"initialise_parts: {name} of {weights.path} is {list(tensor.shape)}, and {list(ours[name].shape)} in "
                "the model of the recipe"
            )
        ours[name].copy_(tensor)  # a state dict shares its memory with the model
    logger.info("%s from %s: %s parameters", part, weights.path, f"{sum(map(torch.numel, theirs.values())):,}")
    return set(theirs)


def _require_same_settings(weights: Weights, wanted: CoCaConfig, keys: Iterable[str]) -> None:
    trained = weights.model
    for key in keys:
        if trained.decoder is None and key.startswith("decoder."):
            continue
        before, other = (attrgetter(key)(config) for config in (trained, wanted))
        if before != other:
            value = json.dumps(before)
            raise WeightsError(
                f"{weights.path} was trained with {key} {before}, the recipe says {other}: set model.{key} = {value}"
            )
    if "text.pool" in keys and trained.text.cls_mask != wanted.text.cls_mask:
        logger.warning(
            "the weights were trained with text.cls_mask %r, the recipe says %r",
            *(trained.text.cls_mask, wanted.text.cls_mask),
        )


def _list_others(model: CoCa, read: Collection[str]) -> str:
    """Return the names of the weights that are not in `read`; of whole parts and layers, one name."""
    names = list(model.state_dict())
    others = [name for name in names if name not in read]
    kept = {name[: end.start()] for name in read for end in re.finditer(r"\.|$", name)}  # every prefix of those read
    prefixes = ([name[: end.start()] for end in re.finditer(r"\.|$", name)] for name in others)
    return ", ".join(dict.fromkeys(next(prefix for prefix in each if prefix not in kept) for each in prefixes))
