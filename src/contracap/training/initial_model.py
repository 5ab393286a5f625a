"""The model before its first step: random, from a file of weights, or with parts from other files."""

import difflib
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter

import torch
from torch import Tensor

from contracap.images import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.onednn import use_onednn
from contracap.pretrained import random_model, read_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.positions import interpolate_positions
from contracap.pretrained.shapes import meta_state, require_same_keys, shapes_of
from contracap.pretrained.weights import Weights
from contracap.training.parts import MODULES, is_in_part, part_of
from contracap.training.recipe import Recipe

# Settings that change what the weights of a part compute, but not their shapes.
SETTINGS = {
    "image": ("vision.activation", "vision.heads"),
    "text": ("text.activation", "text.heads"),
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
        ours = _select(model.state_dict(), part, owner="the model")  # before weights are downloaded
        weights = read_weights(name, fallback=recipe.model_config)
        read |= _load_part(ours, part, weights, model.config)
        if part in ("image", "vision"):
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
    _require_equal(weights, wanted, ["text.pool", "pooler.kind"])  # first, because they decide which weights there are
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
    _require_same_settings(weights, wanted, SETTINGS)
    with torch.device("meta"):
        model = CoCa(wanted)
    model.load_state_dict({name: tensor.float().clone() for name, tensor in fitted.items()}, assign=True)
    use_onednn(model)
    logger.info("weights from %s: %s tensors, %s parameters", weights.path, len(fitted), _count(fitted.values()))
    return model, replace(weights.image, size=wanted.vision.image_size)


def _select(state: Mapping[str, Tensor], part: str, *, owner: str) -> dict[str, Tensor]:
    """Return the weights whose names start with `part`.

    Raises: WeightsError: if there are none; names the parts.
    """
    found = {name: tensor for name, tensor in state.items() if is_in_part(name, part)}
    if not found:
        parts = ", ".join(dict.fromkeys(map(part_of, state)))
        near = difflib.get_close_matches(part, {prefix: None for name in state for prefix in _prefixes(name)}, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"its parts are {parts}"
        raise WeightsError(f"initialise_parts: {owner} has no weights of {part!r}; {remedy}")
    return found


def _load_part(ours: Mapping[str, Tensor], part: str, weights: Weights, wanted: CoCaConfig) -> set[str]:
    """Copy a part of the weights into the tensors of the model, and return their names.

    Weights that only the model has stay as they are: the class token of a text encoder that starts from a CLIP.
    """
    state = interpolate_positions(weights.state, patches=wanted.vision.patches)
    theirs = _select(state, part, owner=str(weights.path))
    _require_same_settings(weights, wanted, [part_of(part)])
    module = MODULES.get(part, part)
    _require_equal(weights, wanted, [f"{module}.layers"] if module in ("vision", "text", "decoder") else [])
    if lost := [name for name in theirs if name not in ours]:
        raise WeightsError(
            f"initialise_parts: {part!r} of {weights.path} has {len(lost)} weights that the model of the recipe lacks, "
            f"such as {lost[0]}"
        )
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            context = wanted.text.context + len(tensor) - len(ours[name]) if name == "text.position" else None
            raise WeightsError(
                f"initialise_parts: {name} of {weights.path} is {list(tensor.shape)}, and {list(ours[name].shape)} in "
                "the model of the recipe" + (f": set model.text.context = {context}" if context else "")
            )
        ours[name].copy_(tensor)  # a state dict shares its memory with the model
    logger.info("%s from %s: %s tensors, %s parameters", part, weights.path, len(theirs), _count(theirs.values()))
    return set(theirs)


def _count(tensors: Iterable[Tensor]) -> str:
    return f"{sum(map(torch.numel, tensors)):,}"


def _require_same_settings(weights: Weights, wanted: CoCaConfig, parts: Collection[str]) -> None:
    """Check the settings of parts. Another mask of the class token is a warning.

    Raises: WeightsError: naming the key to change.
    """
    unused = {"decoder.heads"} if wanted.decoder is None else set[str]()
    unused |= set() if wanted.pooler.has_queries else {"pooler.heads"}
    _require_equal(weights, wanted, (key for part in parts for key in SETTINGS.get(part, ()) if key not in unused))
    masks = [config.text.cls_mask for config in (weights.model, wanted) if config.text.pool == "class_token"]
    if "text" in parts and len(set(masks)) == 2:
        logger.warning("the weights were trained with text.cls_mask %r, the recipe says %r", *masks)


def _require_equal(weights: Weights, wanted: CoCaConfig, keys: Iterable[str]) -> None:
    for key in keys:
        before, other = (attrgetter(key)(config) for config in (weights.model, wanted))
        if before != other:
            value = json.dumps(before)
            raise WeightsError(
                f"{weights.path} was trained with {key} {before}, the recipe says {other}: set model.{key} = {value}"
            )


def _list_others(model: CoCa, read: Collection[str]) -> str:
    """Return the names of the weights that are not in `read`; of whole parts and layers, one name."""
    of_read = {prefix for name in read for prefix in _prefixes(name)}
    others = [name for name in model.state_dict() if name not in read]
    return ", ".join(dict.fromkeys(next(p for p in _prefixes(name) if p not in of_read) for name in others))


def _prefixes(name: str) -> Iterator[str]:
    """Yield `a`, `a.b` and `a.b.c` of `a.b.c`."""
    return accumulate(name.split("."), "{}.{}".format)
