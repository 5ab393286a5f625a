"""Texts of several lengths, packed row after row; only attention sees them padded to a grid."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import pad

ROWS = 64  # packed rows come in multiples of this: oneDNN keeps a kernel for every number (docs/performance.md)


class Grid:
    """Sequences of one length, which need no padding: image tokens, learned queries, texts that are being written."""

    def pad(self, tokens: Float[Tensor, "batch column width"]) -> Float[Tensor, "batch column width"]:
        """The tokens as attention reads them."""
        return tokens

    def unpad(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "batch column *width"]:
        """The tokens as every other layer reads them."""
        return grid


GRID = Grid()


@dataclass(frozen=True, eq=False)
class Packed(Grid):
    """Texts without padding: a row for each token, text after text.

    After the rows of the texts come some for padding, up to a multiple of `ROWS`, but never more than the grid has
    cells. What is computed for them is finite, and nothing else depends on it.

    Attributes:
        tokens: rows of each text that hold its tokens.
        lengths: rows of each text; those after its tokens are for a class token.
        columns: rows of the longest text.
        cells: the cell of the grid that each row belongs to.
        sources: the row that each cell shows; a cell of padding repeats its text's last row. Texts that begin alike may
            share rows, which several cells then show.
    """

    tokens: Int64[Tensor, "batch"]
    lengths: Int64[Tensor, "batch"]
    columns: int
    cells: Int64[Tensor, "rows"]
    sources: Int64[Tensor, "cells"]

    @property
    def last_rows(self) -> Int64[Tensor, "batch"]:
        """The last row of each text."""
        last = rearrange(self.lengths - 1, "batch -> batch 1").clamp(min=0)
        return rearrange(self.sources, "(batch column) -> batch column", column=self.columns).gather(1, last)[:, 0]

    def pad(self, tokens: Float[Tensor, "rows width"]) -> Float[Tensor, "batch column width"]:
        """The rows on a grid with a text a line."""
        return rearrange(
            tokens.index_select(0, self.sources), "(batch column) width -> batch column width", column=self.columns
        )

    def unpad(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "rows *width"]:
        """The rows back from the grid."""
        return grid.flatten(0, 1).index_select(0, self.cells)

    def fit(self, ids: Int64[Tensor, "batch tokens"], *, padding: int) -> Int64[Tensor, "batch column"]:
        """Ids on the grid; whatever stands after a text's tokens becomes `padding`."""
        fitted = pad(ids, (0, max(0, self.columns - ids.shape[1])), value=padding)[:, : self.columns]
        is_padding = torch.arange(self.columns, device=ids.device) >= self.tokens[:, None]
        return fitted.masked_fill(is_padding, padding)


def pack(tokens: Int64[np.ndarray, "batch"], lengths: Int64[np.ndarray, "batch"], *, device: torch.device) -> Packed:
    """The layout of texts with `lengths` rows each, of which the first `tokens` hold tokens."""
    columns = max(1, int(lengths.max()))
    column = np.arange(columns)
    taken = (column < lengths[:, None]).ravel()
    rows = min(-(-max(1, int(lengths.sum())) // ROWS) * ROWS, taken.size)
    cells = np.concatenate([np.flatnonzero(taken), np.flatnonzero(~taken)])[:rows]
    first = lengths.cumsum() - lengths
    sources = (first[:, None] + np.minimum(column, lengths[:, None] - 1)).clip(min=0).ravel()
    sources[cells] = np.arange(rows)
    return _packed(tokens, lengths, columns, cells, sources, device)


def pack_sharing(
    ids: Int64[np.ndarray, "batch tokens"],
    tokens: Int64[np.ndarray, "batch"],
    lengths: Int64[np.ndarray, "batch"],
    *,
    device: torch.device,
) -> Packed:
    """The same for texts whose common beginnings have their rows once, which is right where no row depends on later
    ones.

    Sorted by their ids, each text has its longest common beginning with the one before it.
    """
    columns = max(1, int(lengths.max()))
    column = np.arange(columns)
    order = np.lexsort(ids.T[::-1])
    padded = np.pad(ids, ((0, 0), (0, max(0, columns - ids.shape[1]))))[order, :columns]
    differs = column >= tokens[order, None]
    differs[0] = True
    differs[1:] |= padded[1:] != padded[:-1]
    new = np.logical_or.accumulate(differs, axis=1) & (column < lengths[order, None])  # as does all that follows it
    text, place = new.nonzero()
    cells = order[text] * columns + place
    rows = min(-(-len(cells) // ROWS) * ROWS, new.size)
    newest = np.zeros(new.shape, dtype=np.int64)
    newest[new] = np.arange(len(cells))
    sources = np.empty_like(newest)
    sources[order] = np.maximum.accumulate(newest, axis=0)  # a cell that is not new shows what the one above shows
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
    def sent(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from other memory would wait for the device
        return tensor.to(device, non_blocking=True)

    return Packed(sent(tokens), sent(lengths), columns, sent(cells), sent(sources))
