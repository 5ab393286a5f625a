"""Weights files in our layout and in open_clip's, with the configuration of their model."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from contracap.config import build, to_dict
from contracap.files import replace_file, write_text
from contracap.images import ImageConfig
from contracap.model.coca import CoCaConfig
from contracap.model.sizes import SIZES, find_size
from contracap.model.text import ClsMask
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.find import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, find_weights
from contracap.pretrained.fit import at_own_grid, at_own_lengths, differences, match_sizes, require_fit
from contracap.pretrained.open_clip_config import config_from_open_clip, config_to_open_clip
from contracap.pretrained.open_clip_names import (
    LM_HEAD,
    OF_TWO_POOLERS,
    PROJECTION,
    from_open_clip,
    to_open_clip,
    vocabulary_name,
)
from contracap.pretrained.shapes import Shapes, shapes_of
from contracap.pretrained.tensors import METADATA_KEY, read_tensors
from contracap.wording import text_problem

MAX_CONFIGURATION = 100_000  # bytes of JSON
PREPROCESS_KEYS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}  # the last pads nothing
OUR_NAME = "vision.patch_embedding.weight"  # of a tensor that every model has


@dataclass(frozen=True)
class Weights:
    """The content of a weights file, under our names.

    Attributes:
        layout: the layout of the file, `contracap` or `open_clip`.
    """

    path: Path
    layout: str
    model: CoCaConfig
    image: ImageConfig
    state: dict[str, Tensor]


def read_weights(name: str | Path, *, size: str | None = None, fallback: CoCaConfig | None = None) -> Weights:
    """Read the weights file that a name means, as in `load`.

    The configuration is that of the file or its folder. Without one it is `size`, or `fallback` if it fits the shapes,
    or the one size of the table that does.

    Raises: WeightsError: as `load` does.
    """
    path = find_weights(name)
    tensors, metadata = read_tensors(path)
    if METADATA_KEY in metadata:
        model, image = _own_configuration(path, metadata[METADATA_KEY])
        if size is not None and model != with_cls_mask(find_size(size), model.text.cls_mask):
            raise WeightsError(f"{path} holds another model than {size}; leave the size out, the file knows its own")
    elif OUR_NAME in tensors:
        model, image = _configuration_of_size(path, shapes_of(tensors), size, fallback, ours=True)
    else:
        model, image = _open_clip_configuration(path, tensors, size, fallback)
    ours = METADATA_KEY in metadata or OUR_NAME in tensors
    if not ours and LM_HEAD in tensors and "text.text_projection" not in tensors:
        tensors[vocabulary_name(model)] = tensors.pop(LM_HEAD)
    with name_errors(path):
        require_fit(tensors, model, ours=ours)
        state = tensors if ours else from_open_clip(tensors, model)
    return Weights(path, "contracap" if ours else "open_clip", model, image, state)


def with_cls_mask(model: CoCaConfig, mask: ClsMask) -> CoCaConfig:
    """Return the configuration with this mask, as in `TextConfig.cls_mask`."""
    return replace(model, text=replace(model.text, cls_mask=mask))


def write_weights(path: Path, *, model: CoCaConfig, image: ImageConfig, state: Mapping[str, Tensor]) -> None:
    """Write weights under our names, with the configuration in the metadata; a whole file or none."""
    configuration = json.dumps({"model": to_dict(model), "image": to_dict(image)})
    _write_safetensors(path, state, {METADATA_KEY: configuration})


def save_open_clip(folder: Path, *, model: CoCaConfig, image: ImageConfig, state: Mapping[str, Tensor]) -> None:
    """Write a folder in the layout of open_clip's hub repositories; its tensors are bit-equal to ours."""
    preprocess = {"mean": image.mean, "std": image.std, "interpolation": "bicubic", "resize_mode": image.resize}
    text = json.dumps({"model_cfg": config_to_open_clip(model), "preprocess_cfg": preprocess}, indent=2)
    _write_safetensors(folder / OPEN_CLIP_WEIGHTS, to_open_clip(state, model), {"format": "pt"})
    write_text(folder / OPEN_CLIP_CONFIG, text + "\n")


def _write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    with replace_file(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # a full disk; the system's number is in the text alone
            number = re.search(r"os error (\d+)", str(error))
            reason = os.strerror(int(number[1])) if number else str(error)
            raise OSError(f"{reason}: {path}") from None


def _own_configuration(path: Path, text: str) -> tuple[CoCaConfig, ImageConfig]:
    with name_errors(path, "its configuration cannot be used: "):
        values = _parse(text)
        model, image = build(CoCaConfig, values["model"]), build(ImageConfig, values["image"])
        if image.size != model.vision.image_size:
            raise WeightsError(f"images of {image.size} pixels for a model that takes {model.vision.image_size}")
        return model, image


def _open_clip_configuration(
    path: Path, tensors: Mapping, size: str | None, fallback: CoCaConfig | None
) -> tuple[CoCaConfig, ImageConfig]:
    """Return the model and image configuration of a file in open_clip's layout."""
    if OF_TWO_POOLERS in tensors and PROJECTION in tensors:
        raise WeightsError(
            f"{path} has cascade or parallel poolers as in open_clip 3.3.0, which are unfinished there and have a "
            f"projection, {PROJECTION}; only those of open_clip 4.2 can be read, which have none"
        )
    beside = path.parent / OPEN_CLIP_CONFIG
    if not beside.is_file():
        return _configuration_of_size(path, shapes_of(tensors), size, fallback)
    with name_errors(beside):
        with beside.open("rb") as file:
            values = _parse(file.read(MAX_CONFIGURATION + 1).decode("utf-8-sig"))
        model, wanted = config_from_open_clip(values.get("model_cfg", values)), values.get("preprocess_cfg", {})
        for name, plain in (("mode", "RGB"), ("size", model.vision.image_size)):
            if name in wanted and wanted[name] not in (plain, [plain, plain]):
                raise WeightsError(f"{name} = {wanted[name]!r} in preprocess_cfg is not supported, only {plain!r}")
        if unknown := wanted.keys() - PREPROCESS_KEYS:
            raise WeightsError(f"{min(unknown)} = {wanted[min(unknown)]!r} in preprocess_cfg is not understood")
        if wanted.get("interpolation", "bicubic") != "bicubic":
            raise WeightsError(
                f"interpolation {wanted['interpolation']!r} is not supported, only 'bicubic': write that in its place "
                "if slightly different pixels will do"
            )
        known = {name: wanted[name] for name in ("mean", "std") if name in wanted}
        known |= {"resize": wanted["resize_mode"]} if "resize_mode" in wanted else {}
        image = build(ImageConfig, {"size": model.vision.image_size, **known})
        found = at_own_grid(model, shapes_of(tensors))
        if found != model and not differences(found, shapes_of(tensors)):
            raise WeightsError(
                f"only the grid of the image positions differs: those of {path.name} are for images of "
                f"{found.vision.image_size} pixels, and image_size here is {model.vision.image_size}; correct it"
            )
        return model, image


def _configuration_of_size(
    path: Path, shapes: Shapes, size: str | None, fallback: CoCaConfig | None, *, ours: bool = False
) -> tuple[CoCaConfig, ImageConfig]:
    """Return the configuration of a file that has none: a size of the table, at the file's own image size, patch size
    and context."""
    if LM_HEAD in shapes:
        raise WeightsError(
            f"{path} is a MaMMUT of open_clip 4.2 without a configuration, and its tensors do not tell whether padding "
            f"counts in its mean: put its {OPEN_CLIP_CONFIG} next to it"
        )
    if fallback is not None and not size:
        fitted = at_own_lengths(fallback, shapes, ours=ours)
        if not differences(fitted, shapes, ours=ours):
            return fitted, ImageConfig(size=fitted.vision.image_size)
    sizes = [size] if size else match_sizes(shapes, ours=ours)
    if not sizes:
        raise WeightsError(
            f"{path} has no configuration and fits no known size: name one with --size: {', '.join(SIZES)}"
        )
    if len(sizes) > 1:
        raise WeightsError(
            f"{path} has no configuration and fits {' and '.join(sizes)}, which differ in their activation: say which "
            f"one it is, as in --size {sizes[0]} (OpenAI's models are {sizes[-1]})"
        )
    model = at_own_lengths(find_size(sizes[0]), shapes, ours=ours)
    # open_clip's files mean the legacy CLS mask unless their configuration says otherwise.
    if model.text.pool == "class_token" and not ours:
        model = with_cls_mask(model, "legacy")
    return model, ImageConfig(size=model.vision.image_size)


def _parse(text: str) -> dict[str, Any]:
    """Read the JSON object of a configuration."""
    if len(text) > MAX_CONFIGURATION:
        raise WeightsError(f"longer than {MAX_CONFIGURATION} characters")
    values = json.loads(text)
    if not isinstance(values, dict):
        raise WeightsError(f"not a JSON object, but {text[:20]!r}")
    return values


@contextmanager
def name_errors(path: Path, what: str = "") -> Iterator[None]:
    """A context whose errors become a `WeightsError` that starts with the file's name."""
    try:
        yield
    except KeyError as error:
        raise WeightsError(f"{path}: {what}{error} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        kind = type(error) if isinstance(error, WeightsError) else WeightsError
        raise kind(f"{path}: {what}{text_problem(error)}") from None
