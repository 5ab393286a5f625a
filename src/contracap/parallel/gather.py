"""The gather of all ranks' rows, for a loss over the global batch."""

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it, and warns at each call of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in order of rank.

    With n pairs of width d on each of R ranks, a contrastive loss receives (R - 1) x n x (2 d + 2) numbers per rank.
    """
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    _all_gather(gathered, rows)
    return gathered
