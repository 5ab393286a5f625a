"""How tokens lie in memory: on the grid that attention works on, or row after row without what fills the grid."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import pad

ROWS = 64  # packed rows come in multiples of this: oneDNN keeps a kernel for every number (docs/performance.md)


class Grid:
    """Tokens that are a grid already: pictures, learned queries, texts that are being written."""

    def spread(self, tokens: Float[Tensor, "batch column width"]) -> Float[Tensor, "batch column width"]:
        """The tokens on the grid."""
        return tokens

    def collect(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "batch column *width"]:
        """The tokens back from the grid."""
        return grid


GRID = Grid()


@dataclass(frozen=True, eq=False)
class Packed(Grid):
    """Texts of several lengths, row after row; only attention sees them on a grid, one text a line.

    Attributes:
        lengths: rows of each text.
        columns: the longest text's rows.
        cells: the place on the grid of each row. Behind the rows of the texts some come from empty cells, to fill up
            a multiple of `ROWS`; but there are never more rows than cells, so that a few texts cost no more than on
            the grid. What is computed for an empty cell is finite, and nothing else depends on it.
        sources: the row that each cell shows; an empty cell repeats its text's last row. Where texts `share` rows,
            several cells show one.
    """

    lengths: Int64[Tensor, "batch"]
    columns: int
    cells: Int64[Tensor, "rows"]
    sources: Int64[Tensor, "cells"]

    @property
    def ends(self) -> Int64[Tensor, "batch"]:
        """The row of each text's last token."""
        last = rearrange(self.lengths - 1, "batch -> batch 1").clamp(min=0)
        return rearrange(self.sources, "(batch column) -> batch column", column=self.columns).gather(1, last)[:, 0]

    def spread(self, tokens: Float[Tensor, "rows width"]) -> Float[Tensor, "batch column width"]:
        """The tokens on the grid."""
        return rearrange(
            tokens.index_select(0, self.sources), "(batch column) width -> batch column width", column=self.columns
        )

    def collect(self, grid: Shaped[Tensor, "batch column *width"]) -> Shaped[Tensor, "rows *width"]:
        """The tokens back from the grid."""
        return grid.flatten(0, 1).index_select(0, self.cells)

    def fit(self, ids: Int64[Tensor, "batch tokens"], *, fill: int) -> Int64[Tensor, "batch column"]:
        """Texts cut or filled to the columns of the grid; whatever stands behind a text's rows becomes `fill`."""
        fitted = pad(ids, (0, max(0, self.columns - ids.shape[1])), value=fill)[:, : self.columns]
        behind = torch.arange(self.columns, device=ids.device) >= self.lengths[:, None]
        return fitted.masked_fill(behind, fill)


def pack(lengths: Int64[Tensor, "batch"], *, device: torch.device) -> Packed:
    """The layout of texts with so many rows each. `lengths` are best on the CPU: no shape then waits for `device`."""
    columns = max(1, int(lengths.max()))
    column = torch.arange(columns, device=lengths.device)
    taken = (column < lengths[:, None]).flatten()
    rows = min(-(-max(1, int(lengths.sum())) // ROWS) * ROWS, len(taken))
    cells = torch.cat([taken.nonzero(), taken.logical_not().nonzero()]).squeeze(1)[:rows]
    first = lengths.cumsum(0) - lengths
    sources = (first[:, None] + column.minimum(lengths[:, None] - 1)).clamp(min=0).flatten()
    sources[cells] = torch.arange(rows, device=lengths.device)
    return Packed(lengths.to(device), columns, cells.to(device), sources.to(device))


def share(
    ids: Int64[Tensor, "batch tokens"],
    shared: Int64[Tensor, "batch"],
    lengths: Int64[Tensor, "batch"],
    *,
    device: torch.device,
) -> Packed:
    """The layout of texts whose common beginnings have their rows once, where no row depends on later ones.

    Texts lie in the order of their ids, so that each has its longest common beginning with the one before it.

    Args:
        ids: of the texts, on the CPU.
        shared: first rows of each text that are its ids, and may be another's too; those behind are its own.
        lengths: rows of each text.
    """
    columns = max(1, int(lengths.max()))
    column = torch.arange(columns)
    order = ids.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    sorted_ids = pad(ids, (0, max(0, columns - ids.shape[1])))[order, :columns]
    differs = column >= shared[order, None]
    differs[0] = True
    differs[1:] |= sorted_ids[1:] != sorted_ids[:-1]
    new = differs.cummax(dim=1).values & (column < lengths[order, None])  # what follows a difference differs
    text, place = new.nonzero().T
    cells = order[text] * columns + place
    rows = min(-(-len(cells) // ROWS) * ROWS, new.numel())
    newest = torch.zeros_like(new, dtype=torch.int64).masked_scatter_(new, torch.arange(len(cells)))
    sources = torch.empty_like(newest)
    sources[order] = newest.cummax(dim=0).values  # a cell that is not new shows what the cell above it shows
    sources = sources.gather(1, column.minimum(lengths[:, None] - 1)).flatten()
    fill = cells[:1].expand(rows - len(cells))
    return Packed(lengths.to(device), columns, torch.cat([cells, fill]).to(device), sources.to(device))


def unpacked(lengths: Int64[Tensor, "batch"], *, columns: int, device: torch.device) -> Packed:
    """The layout that fills a grid of so many columns: a row for every cell, fill or not."""
    cells = torch.arange(len(lengths) * columns, device=device)
    return Packed(lengths.to(device), columns, cells, cells)
