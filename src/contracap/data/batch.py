"""Batches of images and captions, which travel from the data to the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from contracap.tokenizer import Lengths


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images and their captions, row by row.

    Pixels are uint8; they are normalised on the device, which takes a quarter of the traffic. The ids are cut to the
    longest text plus one (the padding token that `cls_mask = "legacy"` attends to), rounded up to a multiple of 8, at
    most the context.

    Attributes:
        lengths: tokens of each text, start and end included; they stay on the CPU.
    """

    pixels: UInt8[Tensor, "batch 3 height width"]
    ids: Int64[Tensor, "batch tokens"]
    lengths: Lengths
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`. From pinned memory, the copy does not block the host."""
        return replace(
            self, pixels=self.pixels.to(device, non_blocking=True), ids=self.ids.to(device, non_blocking=True)
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked host memory."""
        return replace(self, pixels=self.pixels.pin_memory(), ids=self.ids.pin_memory())

    @staticmethod
    def join(batches: Sequence["Batch"]) -> "Batch":
        """Join the rows of several batches, in order; in pinned memory if there is a CUDA device."""
        pinned = torch.cuda.is_available()
        if len(batches) == 1:
            return batches[0].pin_memory() if pinned else batches[0]
        rows, tokens = sum(map(len, batches)), max(batch.ids.shape[1] for batch in batches)
        pixels = torch.empty((rows, *batches[0].pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        ids = torch.zeros((rows, tokens), dtype=torch.int64, pin_memory=pinned)
        torch.cat([batch.pixels for batch in batches], out=pixels)
        for part, batch in zip(ids.split([len(batch) for batch in batches]), batches, strict=True):
            part[:, : batch.ids.shape[1]] = batch.ids
        return Batch(
            pixels=pixels,
            ids=ids,
            lengths=np.concatenate([batch.lengths for batch in batches]),
            keys=[key for batch in batches for key in batch.keys],
        )

    def __getitem__(self, rows: slice) -> "Batch":
        """Return some of the rows."""
        return Batch(pixels=self.pixels[rows], ids=self.ids[rows], lengths=self.lengths[rows], keys=self.keys[rows])

    def split(self, parts: int) -> list["Batch"]:
        """Split the rows into equal parts, in order."""
        size = len(self) // parts
        return [self[first : first + size] for first in range(0, size * parts, size)]
