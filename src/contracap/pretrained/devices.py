"""The device and the number format of a model that is used, not trained."""

import logging
import warnings

import torch

from contracap.model.coca import CoCa
from contracap.model.onednn import HAS_ONEDNN, use_bf16
from contracap.precision import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# These stay in fp32. In bf16 many scores of tokens would be equal: on Flickr8k, 17 % of captions would change, not 4 %.
VOCABULARY = "decoder.vocabulary"
EXACT = ("logit_scale", f"{VOCABULARY}.weight")

logger = logging.getLogger(__name__)


def find_device(name: str = "auto") -> torch.device:
    """Return a device; `auto` is the GPU if there is one, else the CPU.

    Raises: ValueError: if this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is no longer used as device type")
            torch.empty(0, device=name).tolist()  # a meta device holds no numbers
    except (RuntimeError, AssertionError, ImportError):
        devices = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(f"this machine has no device {name!r}: use {' or '.join(devices)}") from None
    return torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions that multiply bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch: none
    found = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's
    return device.type == "cpu" and found and torch.backends.mkldnn.is_available()


def find_precision(device: torch.device, wanted: Precision = "auto") -> Precision:
    """Return the precision that a model computes in; `auto` is resolved as `place` says.

    Raises: ValueError: if the device does not compute in this precision.
    """
    if wanted == "auto":
        return ("bf16" if multiplies_bf16(device) else "fp16") if device.type == "cuda" else "fp32"
    if wanted != "fp32" and device.type == "cpu":
        if wanted == "fp16" or not HAS_ONEDNN:
            raise ValueError(f"precision {wanted!r} does not work on this CPU: use fp32{' or bf16' * HAS_ONEDNN}")
        if not multiplies_bf16(device):
            logger.warning("this CPU has no bf16 instructions: fp32 is much faster")
    return wanted


def place(model: CoCa, *, device: torch.device, precision: Precision) -> CoCa:
    """Move a model to a device, in the precision that it will compute in, and return it.

    `auto` is bf16 on a CUDA device that multiplies it, fp16 on other CUDA devices, and fp32 elsewhere. On a CPU, bf16
    is the format of the matrix products only. The product with the vocabulary, the embeddings and the logit scale are
    always in float32.

    Raises: ValueError: if the device does not compute in this precision.
    """
    precision = find_precision(device, precision)
    if precision == "bf16" and device.type == "cpu":
        use_bf16(layer for name, layer in model.named_modules() if name != VOCABULARY)
    else:
        convert(model.to(device), DTYPES[precision])
    model.precision = precision
    return model


def convert(model: CoCa, dtype: torch.dtype) -> None:
    """Convert the parameters of a model, except those that must be exact."""
    for name, parameter in model.named_parameters():
        if name not in EXACT:
            parameter.data = parameter.data.to(dtype)
