"""Packing: texts of different lengths are stored without padding; only attention sees them padded to a grid."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

ROWS = 64  # the number of packed rows is a multiple of it: oneDNN caches a kernel per number (docs/performance.md)


class Layout(ABC):
    """How the tokens of a batch are stored: `Grid` or `Packed`."""

    @abstractmethod
    def pad(self, tokens: Float[Tensor, "*rows width"]) -> Float[Tensor, "batch column width"]:
        """Return the tokens as attention reads them."""

    @abstractmethod
    def unpad(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "..."]:
        """Return the tokens as all other layers read them."""


class Grid(Layout):
    """Layout of sequences of equal length, without padding: image tokens, learned queries, texts during decoding."""

    def pad(self, tokens: Float[Tensor, "batch column width"]) -> Float[Tensor, "batch column width"]:
        return tokens

    def unpad(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "batch column *width"]:
        return grid


GRID = Grid()


@dataclass(frozen=True, eq=False)
class Packed(Layout):
    """Layout of packed texts: one row for each token, text after text.

    Padding rows after the texts fill up to a multiple of `ROWS`, but never to more rows than the grid has cells. Their
    values are finite, and no other row depends on them.

    Attributes:
        tokens: rows of each text that hold its tokens.
        lengths: rows of each text; those after its tokens are for a class token.
        columns: rows of the longest text.
        cells: the grid cell of each row.
        sources: the row that each cell copies; padding cells copy the last row of their text. Texts with a common
            prefix may share rows: several cells then copy the same row.
    """

    tokens: Int64[Tensor, "batch"]
    lengths: Int64[Tensor, "batch"]
    columns: int
    cells: Int64[Tensor, "rows"]
    sources: Int64[Tensor, "cells"]

    @property
    def last_rows(self) -> Int64[Tensor, "batch"]:
        """The index of the last row of each text."""
        last = rearrange(self.lengths - 1, "batch -> batch 1").clamp(min=0)
        return rearrange(self.sources, "(batch column) -> batch column", column=self.columns).gather(1, last)[:, 0]

    def pad(self, tokens: Float[Tensor, "rows width"]) -> Float[Tensor, "batch column width"]:
        """Copy the rows to a grid with one text per line."""
        return rearrange(
            tokens.index_select(0, self.sources), "(batch column) width -> batch column width", column=self.columns
        )

    def unpad(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "rows *width"]:
        """Copy the rows back from the grid."""
        return grid.flatten(0, 1).index_select(0, self.cells)

    def fit(self, ids: Int64[Tensor, "batch position"], *, padding: int) -> Int64[Tensor, "batch column"]:
        """Cut or extend ids to the columns of the grid; set everything after a text's tokens to `padding`."""
        fitted = functional.pad(ids, (0, max(0, self.columns - ids.shape[1])), value=padding)[:, : self.columns]
        is_padding = torch.arange(self.columns, device=ids.device) >= self.tokens[:, None]
        return fitted.masked_fill(is_padding, padding)


def pack(tokens: Int64[np.ndarray, "batch"], lengths: Int64[np.ndarray, "batch"], *, device: torch.device) -> Packed:
    """Return the layout of texts with `lengths` rows each, the first `tokens` of which hold tokens."""
    columns = max(1, int(lengths.max()))
    column = np.arange(columns)
    taken = (column < lengths[:, None]).ravel()
    rows = min(math.ceil(max(1, int(lengths.sum())) / ROWS) * ROWS, taken.size)
    cells = np.concatenate([np.flatnonzero(taken), np.flatnonzero(~taken)])[:rows]
    first = lengths.cumsum() - lengths
    sources = (first[:, None] + np.minimum(column, lengths[:, None] - 1)).clip(min=0).ravel()
    sources[cells] = np.arange(rows)
    return _packed(tokens, lengths, columns, cells, sources, device)


def pack_shared_prefixes(
    ids: Int64[np.ndarray, "batch position"],
    tokens: Int64[np.ndarray, "batch"],
    lengths: Int64[np.ndarray, "batch"],
    *,
    device: torch.device,
) -> Packed:
    """Return a layout in which texts share the rows of common prefixes. No row may depend on later ones.

    In an order sorted by ids, each text has its longest common prefix with the text before it.
    """
    columns = max(1, int(lengths.max()))
    column = np.arange(columns)
    order = np.lexsort(ids.T[::-1])
    padded = np.pad(ids, ((0, 0), (0, max(0, columns - ids.shape[1]))))[order, :columns]
    differs = column >= tokens[order, None]
    differs[0] = True
    differs[1:] |= padded[1:] != padded[:-1]
    new = np.logical_or.accumulate(differs, axis=1) & (column < lengths[order, None])  # so is all after it
    text, place = new.nonzero()
    cells = order[text] * columns + place
    rows = min(math.ceil(len(cells) / ROWS) * ROWS, new.size)
    newest = np.zeros(new.shape, dtype=np.int64)
    newest[new] = np.arange(len(cells))
    sources = np.empty_like(newest)
    sources[order] = np.maximum.accumulate(newest, axis=0)  # a shared cell copies the cell above
    sources = np.take_along_axis(sources, np.minimum(column, lengths[:, None] - 1), axis=1).ravel()
    cells = np.concatenate([cells, np.repeat(cells[:1], rows - len(cells))])
    return _packed(tokens, lengths, columns, cells, sources, device)


def _packed(
    tokens: Int64[np.ndarray, "batch"],
    lengths: Int64[np.ndarray, "batch"],
    columns: int,
    cells: Int64[np.ndarray, "rows"],
    sources: Int64[np.ndarray, "cells"],
    device: torch.device,
) -> Packed:
    def send(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the device
        return tensor.to(device, non_blocking=True)

    return Packed(send(tokens), send(lengths), columns, send(cells), send(sources))
