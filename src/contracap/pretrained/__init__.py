"""From a name, a file, a folder or a hub repository to a model and its processor, and from a model to a file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from contracap.config import build, to_dict
from contracap.files import replacing, write_text
from contracap.images import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.onednn import use_onednn
from contracap.model.sizes import SIZES, find_size
from contracap.model.text import ClsMask
from contracap.pretrained.find import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, find_weights
from contracap.pretrained.names import (
    Shapes,
    WeightsError,
    at_own_grid,
    at_own_lengths,
    differences,
    from_open_clip,
    match_sizes,
    require_fit,
    shapes_of,
    to_open_clip,
)
from contracap.pretrained.open_clip import config_from_open_clip, config_to_open_clip
from contracap.pretrained.tensors import METADATA_KEY, read_tensors
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

MAX_CONFIGURATION = 100_000  # bytes of JSON
PREPROCESS_KEYS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}  # the last pads nothing
OUR_NAME = "vision.patch_embedding.weight"  # of a tensor that every model has


@dataclass(frozen=True)
class Weights:
    """What a file holds, under our names.

    Attributes:
        layout: `contracap` or `open_clip`, the names the file used.
    """

    path: Path
    layout: str
    model: CoCaConfig
    image: ImageConfig
    state: dict[str, Tensor]


def load(
    name: str | Path, *, weights: str | Path | None = None, seed: int | None = None, size: str | None = None
) -> tuple[CoCa, Processor]:
    """A model in evaluation mode, float32 on the CPU, and the processor that feeds it.

    Args:
        name: a size of the table, which then needs `weights`; or what holds weights: a file (safetensors, or a
            pickle, whose tensors alone are read), a folder, a run or one of its checkpoints,
            `hf-hub:organisation/repository`, or a release such as `coca_ViT-L-14/laion2b`.
        weights: for a size: the same choice, or "random".
        seed: for random weights; 0 when left out.
        size: for a file that does not say its size and fits none of the table's.

    Raises:
        WeightsError: nothing there, another kind of file, or keys that are missing, extra or misshapen, by name.
    """
    if str(name) in SIZES:
        if weights is None:
            raise WeightsError(
                f"{name} is a size, not weights: add weights=FILE, FOLDER or 'hf-hub:organisation/name' to load some, "
                "or weights='random' for a model that knows nothing"
            )
        if weights == "random":
            return random_model(find_size(str(name)), seed=seed or 0)
        name, size = weights, str(name)
    elif weights is not None:
        raise WeightsError(f"weights= goes with a size, and {str(name)!r} is none; the sizes are {', '.join(SIZES)}")
    if seed is not None:
        raise WeightsError("seed= is for weights='random'")
    found = read_weights(name, size=size)
    with _naming(found.path):
        processor = processor_for(found.model, found.image)
    with torch.device("meta"):
        model = CoCa(found.model)
    model.load_state_dict(found.state, assign=True)
    model.float()
    use_onednn(model)
    return model.eval().requires_grad_(True), processor


def load_on_device(name: str | Path, *, size: str | None = None, device: str | None = None) -> tuple[CoCa, Processor]:
    """Load as `load` does, and put the model on a device, by default the GPU if there is one."""
    model, processor = load(name, size=size)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def check_device(name: str | None) -> None:
    """Raises: ValueError: if there is no such device here."""
    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"there is no device {name!r} here: {reason} Take cpu, cuda or cuda:1") from None


def random_model(config: CoCaConfig, *, seed: int) -> tuple[CoCa, Processor]:
    """A model with initial weights, in evaluation mode. The caller's random generator is left as it was."""
    with torch.device("meta"):
        model = CoCa(config)
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialise()
    use_onednn(model)
    return model.eval(), processor_for(config, ImageConfig(size=config.vision.image_size))


def processor_for(model: CoCaConfig, image: ImageConfig) -> Processor:
    """The processor whose images and texts fit the model."""
    return Processor(image, Tokenizer(context=model.text.context, vocab_size=model.text.vocab_size))


def read_weights(name: str | Path, *, size: str | None = None) -> Weights:
    """Read what a name means. The configuration comes from the file or its folder, else from `size`, else from the one
    size of the table that fits the shapes.

    Raises: WeightsError: as `load`.
    """
    path = find_weights(name)
    tensors, metadata = read_tensors(path)
    if METADATA_KEY in metadata:
        model, image = _own_configuration(path, metadata[METADATA_KEY])
        if size is not None and model != with_cls_mask(find_size(size), model.text.cls_mask):
            raise WeightsError(f"{path} holds another model than {size}; leave the size out, the file knows its own")
        with _naming(path):
            require_fit(tensors, model, ours=True)
        return Weights(path, "contracap", model, image, tensors)
    if OUR_NAME in tensors:
        model, image = _bare_configuration(path, shapes_of(tensors), size, ours=True)
        with _naming(path):
            require_fit(tensors, model, ours=True)
        return Weights(path, "contracap", model, image, tensors)
    model, image = _foreign_configuration(path, tensors, size)
    with _naming(path):
        return Weights(path, "open_clip", model, image, from_open_clip(tensors, model))


def with_cls_mask(model: CoCaConfig, mask: ClsMask) -> CoCaConfig:
    """The same model with this mask: see `TextConfig.cls_mask`."""
    return replace(model, text=replace(model.text, cls_mask=mask))


def save(path: str | Path, model: CoCa, processor: Processor) -> None:
    """Write a model to a `.safetensors` file that `load` reads back, its configuration inside. The file appears whole
    or not at all.

    Raises: WeightsError: if the name ends otherwise. OSError: if the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"{path} must end in .safetensors")
    write_weights(Path(path), model=model.config, image=processor.image_config, state=model.state_dict())


def write_weights(path: Path, *, model: CoCaConfig, image: ImageConfig, state: Mapping[str, Tensor]) -> None:
    """Write weights under our names, the configuration in the metadata; the file appears whole or not at all."""
    configuration = json.dumps({"model": to_dict(model), "image": to_dict(image)})
    _write_safetensors(path, state, {METADATA_KEY: configuration})


def save_open_clip(folder: Path, *, model: CoCaConfig, image: ImageConfig, state: Mapping[str, Tensor]) -> None:
    """Write open_clip's hub folder: `open_clip_config.json` and `open_clip_model.safetensors`, bit-equal to what was
    read."""
    preprocess = {"mean": image.mean, "std": image.std, "interpolation": "bicubic", "resize_mode": image.resize}
    text = json.dumps({"model_cfg": config_to_open_clip(model), "preprocess_cfg": preprocess}, indent=2)
    _write_safetensors(folder / OPEN_CLIP_WEIGHTS, to_open_clip(state, model), {"format": "pt"})
    write_text(folder / OPEN_CLIP_CONFIG, text + "\n")


def _write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as partial:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, partial, metadata=metadata)


def _own_configuration(path: Path, text: str) -> tuple[CoCaConfig, ImageConfig]:
    with _naming(path, "its configuration cannot be used: "):
        values = _parse(text)
        model, image = build(CoCaConfig, values["model"]), build(ImageConfig, values["image"])
        if image.size != model.vision.image_size:
            raise WeightsError(f"images of {image.size} pixels for a model that takes {model.vision.image_size}")
        return model, image


def _foreign_configuration(path: Path, tensors: Mapping, size: str | None) -> tuple[CoCaConfig, ImageConfig]:
    """Sizes and image preparation of a file in open_clip's layout."""
    beside = path.parent / OPEN_CLIP_CONFIG
    if not beside.is_file():
        return _bare_configuration(path, shapes_of(tensors), size)
    with _naming(beside):
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


def _bare_configuration(
    path: Path, shapes: Shapes, size: str | None, *, ours: bool = False
) -> tuple[CoCaConfig, ImageConfig]:
    """Return the configuration for a file without one: a size of the table, at the file's own image size, patch size
    and context."""
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
    # A file of open_clip without a word on its CLS mask means the legacy one.
    if model.text.pool == "class_token" and not ours:
        model = with_cls_mask(model, "legacy")
    return model, ImageConfig(size=model.vision.image_size)


def _parse(text: str) -> Any:
    """The JSON of a configuration."""
    if len(text) > MAX_CONFIGURATION:
        raise WeightsError(f"longer than {MAX_CONFIGURATION} characters")
    return json.loads(text)


@contextmanager
def _naming(path: Path, what: str = "") -> Iterator[None]:
    """Put the file's name before what is wrong with its content."""
    try:
        yield
    except KeyError as error:
        raise WeightsError(f"{path}: {what}{error} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise WeightsError(f"{path}: {what}{error}") from None
