"""The rows of all ranks, for a loss over the global batch."""

import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave it a new name, and warns at each call of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, a rank's after the other's.

    A contrastive loss of n pairs of width d on each of R ranks receives (R - 1) x n x (2 d + 2) numbers per rank.
    """
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    _all_gather(gathered, rows)
    return gathered
