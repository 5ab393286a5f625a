"""Named tensors from the weights files of any program. No code in the file runs."""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contracap.pretrained.errors import WeightsError

METADATA_KEY = "contracap"  # of safetensors files in our own layout
# Where training programs put the weights, best first: a moving average is taken where nothing else is there.
STATE_DICTS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
)
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # DDP, compile, FSDP, recompute
SCALE = "logit_scale"  # every layout has it at the top
# Tensors that are no weights: masks, OpenAI's notes on sizes, and the bias of the sigmoid loss, which scores alone use.
NOT_WEIGHTS = {
    "attn_mask",
    "text.attn_mask",
    "text_decoder.attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "logit_bias",
}
MAX_STRUCTURE = 2**24  # bytes of a pickle without its tensors; torch reads it at about 1 MB in 2 s
MAX_UNPACKED = 4  # bytes that tensors may take for each byte of their file, which stores them as they are


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, in memory of their own, and the metadata of a safetensors file.

    A training checkpoint gives its weights. Prefixes of names that wrappers and training programs add are removed.

    Raises: WeightsError: saying what the file is, if it is not a readable weights file.
    """
    if _is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is not a readable safetensors file, it may be cut off: get it again ({error})"
            ) from None
    else:
        tensors, metadata = _state_dict(path, _unpickle(path)), {}
    if METADATA_KEY not in metadata:
        tensors = {name: each for name, each in _plain_names(path, tensors).items() if name not in NOT_WEIGHTS}
        if SCALE in tensors and tensors[SCALE].shape == (1,):
            tensors[SCALE] = tensors[SCALE].reshape(())
    size, found = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if found > MAX_UNPACKED * size:
        raise WeightsError(f"{path} has {size} bytes, but its tensors would take {found}: it is not a weights file")
    # Tensors of a file are views of it, at any address; kernels round differently on those.
    return {name: tensors.pop(name).detach().clone(memory_format=torch.contiguous_format) for name in list(tensors)}, (
        metadata
    )


def _is_safetensors(path: Path) -> bool:
    """Return True for a safetensors file and False for a pickle, by the first bytes.

    Raises: WeightsError: if it is neither.
    """
    with path.open("rb") as file:
        head = file.read(256)
    if head[8:9] == b"{":
        return True
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip archive, and what it wrote before
        return False
    if not head:
        what = "it is empty"
    elif head.startswith(b"version https://git-lfs"):
        what = "it is a pointer of Git LFS to the real file: get that by `git lfs pull`"
    elif re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        what = "it is a web page, such as a server sends in place of a file: get the file again"
    else:
        what = f"neither safetensors nor a file of torch; it begins with {head[:24]!r}"
    raise WeightsError(f"{path} is not a weights file: {what}")


class _Ignored:
    """Replaces numpy's objects in the optimizer state of a checkpoint, which nobody reads."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_OF_NUMPY: list[Callable | tuple[Callable, str]] = [
    (_Ignored, f"numpy.{name}")
    for name in (
        "dtype",
        "ndarray",
        "core.multiarray.scalar",
        "_core.multiarray.scalar",
        "core.multiarray._reconstruct",
        "_core.multiarray._reconstruct",
    )
]


def _unpickle(path: Path) -> Any:
    damaged = f"{path} is not a file of plain tensors: it is cut off or damaged, or not a file of torch: get it again"
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # as torch decides
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise WeightsError(f"{path} is a TorchScript program: save its state_dict() instead")
            if sum(entry.file_size for entry in entries) > MAX_UNPACKED * path.stat().st_size:
                raise WeightsError(f"{path} is a compressed archive; torch stores weights as they are")
            if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_STRUCTURE for entry in entries):
                raise _too_long(path)
        else:
            _require_small_structure(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_OF_NUMPY):
            warnings.simplefilter("ignore")  # torch asks users to file issues
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # torch raises many kinds, pickle's own among them
        if found := re.search(r"(?:GLOBAL|Unsupported class|global) ([\w.]+\.[\w.]+)", str(error)):
            raise WeightsError(
                f"{path} is not a file of plain tensors: it also holds {found[1]}, which only code could rebuild. "
                "Where you trust it, write its state_dict alone to another file"
            ) from None
        raise WeightsError(damaged) from None


def _too_long(path: Path) -> WeightsError:
    return WeightsError(f"{path} is not a weights file: names and shapes take more than {MAX_STRUCTURE} bytes")


def _require_small_structure(path: Path) -> None:
    """Check the five pickles at the start of a file that is not an archive: its format, its content, its storage names.

    Raises: WeightsError: if they are longer than those of weights. ValueError: if there are no such pickles.
    """
    with path.open("rb") as file:
        start = io.BytesIO(file.read(MAX_STRUCTURE))
    try:
        for _ in range(5):
            for _ in pickletools.genops(start):
                pass
    except ValueError:
        if start.tell() == MAX_STRUCTURE:
            raise _too_long(path) from None
        raise


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the named tensors of a pickle."""
    for _ in range(len(STATE_DICTS)):  # a dict may hold itself
        if not isinstance(content, Mapping):
            break
        inside = [content[name] for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
        if not inside:
            break
        content = inside[0]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors: it is not a weights file")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise WeightsError(f"{path} is not a weights file: it holds {', '.join(map(str, content)) or 'nothing'}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise WeightsError(f"{path}: {name} is a sparse, quantised or empty tensor; weights are plain numbers")
    return tensors


def _plain_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the parts of wrappers in their names, and without the prefix of `logit_scale`.

    If a file has several copies of a model under different prefixes, one that is not a moving average is taken.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain.setdefault(short, tensor) is not tensor:
            raise WeightsError(f"{path} holds two tensors that are {short} but for their prefixes")
    prefixes = [name.removesuffix(SCALE) for name in plain if f".{name}".endswith(f".{SCALE}")]
    if not prefixes:
        return plain
    chosen = min(prefixes, key=lambda prefix: "ema" in prefix)
    others = tuple(prefix for prefix in prefixes if prefix != chosen and not chosen.startswith(prefix))
    return {
        name.removeprefix(chosen): tensor
        for name, tensor in plain.items()
        if name != "n_averaged" and not (others and name.startswith(others))
    }
