"""From a name, a file, a folder or a hub repository to a model and its processor, and from a model to a file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from contracap.config import ConfigError, build, to_dict
from contracap.files import replacing, write_text
from contracap.image import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES, find_size
from contracap.model.weights import (
    WeightsError,
    config_from_open_clip,
    config_to_open_clip,
    from_open_clip,
    match_size,
    meta_state,
    require_same_keys,
    shapes_of,
    to_open_clip,
)
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

METADATA_KEY = "contracap"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
WEIGHT_FILES = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
PICKLES = (".bin", ".pt", ".pth")


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
        name: a size of the table, which then needs `weights`; or what holds weights: a file (`.safetensors`, or a
            pickle with tensors only), a folder, a run's checkpoint, or `hf-hub:organisation/repository`.
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
    with torch.device("meta"):
        model = CoCa(found.model)
    model.load_state_dict(found.state, assign=True)
    model.float()
    return model.eval().requires_grad_(True), processor_for(found.model, found.image)


def load_on_device(name: str | Path, *, size: str | None = None, device: str | None = None) -> tuple[CoCa, Processor]:
    """As `load`, the model on a device; None: the GPU if there is one."""
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
    return model.eval(), processor_for(config, ImageConfig(size=config.vision.image_size))


def processor_for(model: CoCaConfig, image: ImageConfig) -> Processor:
    """The processor whose pictures and texts fit the model."""
    return Processor(image, Tokenizer(context=model.text.context, vocab_size=model.text.vocab_size))


def read_weights(name: str | Path, *, size: str | None = None) -> Weights:
    """Read a file, a folder or an `hf-hub:` name. The configuration comes from the file or its folder, else from
    `size`, else from
    the one size of the table that fits the shapes.

    Raises: WeightsError: as `load`.
    """
    path = find_weights(name)
    tensors, metadata = read_tensors(path)
    if METADATA_KEY in metadata:
        model, image = _own_configuration(path, metadata[METADATA_KEY])
        if size is not None and model != find_size(size):
            raise WeightsError(f"{path} holds another model than {size}; leave the size out, the file knows its own")
        with _naming(path):
            require_same_keys(shapes_of(tensors), shapes_of(meta_state(model)))
        return Weights(path, "contracap", model, image, tensors)
    model, image = _foreign_configuration(path, tensors, size)
    with _naming(path):
        return Weights(path, "open_clip", model, image, from_open_clip(tensors, model))


def find_weights(name: str | Path) -> Path:
    """The weights file that a name means.

    Raises: WeightsError: if there is none.
    """
    if str(name).startswith("hf-hub:"):
        return _from_hub(str(name).removeprefix("hf-hub:"))
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in WEIGHT_FILES:
            if (path / candidate).is_file():
                return path / candidate
        raise WeightsError(f"{path} holds no weights; looked for {', '.join(WEIGHT_FILES)}")
    raise WeightsError(
        f"no weights at {str(name)!r}: neither a file, a folder, 'hf-hub:...' nor a size ({', '.join(SIZES)})"
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file and, of safetensors, the metadata. Pickles are read with tensors only, never with code; of a
    training checkpoint, its `state_dict`.

    Raises: WeightsError: if the file is broken or of another kind.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {error}") from None
    if path.suffix in PICKLES:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds, pickle's own among them
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WeightsError(f"{path} is not a file of plain tensors: {reason}") from None
        content = content.get("state_dict", content) if isinstance(content, Mapping) else content
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors: not a weights file")
        if others := [key for key, tensor in content.items() if not isinstance(tensor, Tensor)]:
            raise WeightsError(f"{path} is no weights file: {others[0]} is no tensor")
        return {str(key).removeprefix("module."): tensor for key, tensor in content.items()}, {}
    raise WeightsError(f"{path} is no weights file: the ending must be .safetensors, {', '.join(PICKLES)}")


def save(path: Path, *, model: CoCaConfig, image: ImageConfig, state: Mapping[str, Tensor]) -> None:
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
    try:
        values = json.loads(text)
        return build(CoCaConfig, values["model"]), build(ImageConfig, values["image"])
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path} says a configuration that cannot be read: {error}") from None


def _foreign_configuration(path: Path, tensors: Mapping, size: str | None) -> tuple[CoCaConfig, ImageConfig]:
    """Sizes and picture preparation of a file in open_clip's layout."""
    beside = path.parent / OPEN_CLIP_CONFIG
    if beside.is_file():
        try:
            values = json.loads(beside.read_text())
            model = config_from_open_clip(values.get("model_cfg", values))
            wanted = values.get("preprocess_cfg", {})
            if wanted.get("interpolation", "bicubic") != "bicubic":
                raise WeightsError(f"interpolation {wanted['interpolation']!r} is not supported: only bicubic is")
            known = {name: wanted[name] for name in ("mean", "std") if name in wanted}
            known |= {"resize": wanted["resize_mode"]} if "resize_mode" in wanted else {}
            return model, build(ImageConfig, {"size": model.vision.image_size, **known})
        except (json.JSONDecodeError, AttributeError, ValueError) as error:
            raise WeightsError(f"{beside} cannot be used: {error}") from None
    size = size or match_size(shapes_of(tensors))
    if size is None:
        raise WeightsError(f"{path} says no configuration and fits no size exactly; name one: {', '.join(SIZES)}")
    model = find_size(size)
    # A file of open_clip without a word on its CLS mask means the legacy one.
    if model.text.pool == "class_token":
        model = replace(model, text=replace(model.text, cls_mask="legacy"))
    return model, ImageConfig(size=model.vision.image_size)


def _from_hub(repository: str) -> Path:
    """Download configuration and weights of a hub repository into the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    repository, _, revision = repository.partition("@")

    def download(name: str) -> Path | None:
        """The file, or None if the repository has none of that name."""
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError:  # no connection, and not in the cache: a kind of EntryNotFoundError
            raise WeightsError(
                f"hf-hub:{repository}: {name} is not in the cache, and the hub does not answer"
            ) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise WeightsError(f"hf-hub:{repository}: {str(error).strip().splitlines()[0]}") from None

    download(OPEN_CLIP_CONFIG)  # beside the weights; our own files carry their configuration inside
    for candidate in WEIGHT_FILES:
        if path := download(candidate):
            return path
    raise WeightsError(f"hf-hub:{repository} holds no weights; looked for {', '.join(WEIGHT_FILES)}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with its content."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
