"""Checks that the tensors of a file fit a model, in our layout or in open_clip's, and the size that they fit."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from contracap.model.coca import CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained.errors import NonFiniteWeightsError, WeightsError
from contracap.pretrained.open_clip_names import OPEN_CLIP_POSITIONS, to_open_clip
from contracap.pretrained.positions import IMAGE_POSITIONS
from contracap.pretrained.shapes import Shapes, key_differences, meta_state, shapes_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_fit(tensors: Mapping[str, Tensor], config: CoCaConfig, *, ours: bool) -> None:
    """Check the names, shapes, types and numbers of the tensors of a file, in our layout or in open_clip's.

    Raises: WeightsError: naming what does not fit.
    """
    if problems := differences(config, shapes_of(tensors), ours=ours):
        raise WeightsError("the weights do not fit: " + "; ".join(problems))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise WeightsError(f"{name} is {tensor.dtype}: weights are float16, bfloat16, float32 or float64")
    if broken := find_nonfinite(tensors):
        raise NonFiniteWeightsError(
            f"{broken} holds NaN or infinity, as after a diverged run: take an earlier checkpoint"
        )


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None if all numbers are finite."""
    for name, tensor in tensors.items():
        if tensor.dtype in DTYPES and not tensor.sum().isfinite() and not tensor.isfinite().all():
            return name  # the sum is faster, but may overflow
    return None


def differences(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> list[str]:
    """Return the differences between tensors of these shapes and those of a model; none if all agree.

    Raises: WeightsError: if the model cannot be built.
    """
    layers = config.vision.layers + config.text.layers + (config.decoder.layers if config.decoder else 0)
    if layers > len(found):  # a layer has several tensors: refused before a model is built
        return [f"the configuration has {layers} layers, and there are {len(found)} tensors"]
    return key_differences(found, _shapes(config, ours))


@lru_cache(maxsize=64)
def _shapes(config: CoCaConfig, ours: bool) -> Shapes:
    state = meta_state(config)
    return shapes_of(state if ours else to_open_clip(state, config))


def match_sizes(found: Shapes, *, ours: bool = False) -> list[str]:
    """Return the sizes of the table that these names and shapes fit, at their own image size, patch size and context.

    There may be several, because shapes do not tell the activation.
    """
    width = tuple(found.get("vision.class_token" if ours else "visual.class_embedding", ()))
    same_width = {name: config for name, config in SIZES.items() if width == (config.vision.width,)}
    fitted = {name: at_own_lengths(config, found, ours=ours) for name, config in same_width.items()}
    fitting = [name for name, config in fitted.items() if not differences(config, found, ours=ours)]
    same_patches = [name for name in fitting if fitted[name].vision.patch_size == SIZES[name].vision.patch_size]
    return same_patches or fitting


def family_of(found: Shapes) -> str:
    """Return the family of a model with tensors of these names, in our layout or in open_clip's."""
    parts = {name.split(".")[0] for name in found}
    if "map_viz2txt_kv" in parts or "pooler.caption_projection.weight" in found:
        return "MaMMUT"
    if parts & {"text_decoder", "decoder"}:
        return "CoCa"
    return "CLIP" if "logit_scale" in parts and parts & {"visual", "vision"} else "unknown"


def at_own_lengths(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> CoCaConfig:
    """Return the configuration at the patch size, image size and context of the tensors in a file."""
    text = "" if ours or config.text.pool == "end_token" else "text."
    patch = found.get("vision.patch_embedding.weight" if ours else "visual.conv1.weight") or (0, 0)
    patch_size = math.isqrt(patch[1] // 3) if ours else patch[-1]
    positions = found.get("text.position" if ours else f"{text}positional_embedding") or (0,)
    context = positions[0] - (config.text.pool == "class_token")
    if patch_size < 1 or context < 1:
        return config
    # The image has a single patch until `at_own_grid` counts them: its side must be a multiple of the patch's.
    vision = replace(config.vision, patch_size=patch_size, image_size=patch_size)
    fitted = replace(config, vision=vision, text=replace(config.text, context=context))
    return at_own_grid(fitted, found, ours=ours)


def at_own_grid(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> CoCaConfig:
    """Return the configuration at the image size of the positions in a file, if their grid is square."""
    shape = found.get(IMAGE_POSITIONS[0] if ours else OPEN_CLIP_POSITIONS) or (0,)
    side = math.isqrt(max(0, shape[0] - 1))
    if not side or side**2 + 1 != shape[0]:
        return config
    return replace(config, vision=replace(config.vision, image_size=side * config.vision.patch_size))
