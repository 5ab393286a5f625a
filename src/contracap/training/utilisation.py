"""Model FLOPs utilisation (MFU): the share of its device's peak speed that a run uses."""

from dataclasses import dataclass

import torch

from contracap.losses import LossConfig
from contracap.model.coca import CoCa
from contracap.training.flops import TextLengths, count_flops, training_flops
from contracap.training.gpus import find_gpu

# The driver's names of the GPUs in the table. Others of the same family, such as an H100 for PCIe, are slower.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200-141g",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peak speed of one device.

    Attributes:
        flops: multiplications and additions per second.
        source: where the figure comes from.
    """

    flops: float
    source: str


def find_peak(device: torch.device, *, bf16: bool, stated: float | None) -> Peak | None:
    """Return the peak of a device: the stated one, else that of the table of GPUs; None if neither is known.

    Args:
        bf16: the run multiplies in bf16, not float32.
        stated: in TFLOP/s.
    """
    if stated is not None:
        return Peak(flops=stated * 1e12, source="peak_tflops of the recipe")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if name not in DEVICES:
        return None
    gpu = find_gpu(DEVICES[name])
    return Peak(flops=gpu.bf16 if bf16 else gpu.fp32, source=f"dense {'bf16' if bf16 else 'fp32'} of an {name}")


class ModelUtilisation:
    """The operations of the model's forward and backward pass, divided by those of the peak in the same time.

    Texts count with their mean length, without padding. A backward pass counts as two forward passes; a frozen tower
    has none. Recomputed activations and the optimizer do not count.
    """

    def __init__(self, model: CoCa, loss: LossConfig, peak: Peak):
        self.peak = peak
        self._model, self._loss = model, loss

    def __str__(self) -> str:
        return (
            f"mfu: operations of forward and backward pass, without padding and recomputation, as a share of "
            f"{self.peak.flops / 1e12:,.5g} TFLOP/s for each device ({self.peak.source})"
        )

    def flops(self, tokens: float) -> float:
        """Return the operations of a step per sample, for a text of `tokens` tokens, start and end included."""
        shorter, share = int(tokens), tokens % 1  # interpolates between whole lengths, which are cached
        return (1 - share) * self._counted(shorter) + (share and share * self._counted(shorter + 1))

    def _counted(self, tokens: int) -> float:
        counted = count_flops(self._model.config, self._loss, TextLengths(mean=float(tokens), longest=tokens))
        return sum(training_flops(self._model, counted.parts).values())

    def __call__(self, samples_per_second: float, tokens: float) -> float:
        """Return the MFU, from 0 to 1, given the speed of one device and the mean length of the texts."""
        return samples_per_second * self.flops(tokens) / self.peak.flops
