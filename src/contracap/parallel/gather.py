"""The rows of all ranks, for a loss over the global batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from contracap.losses import Gather

# torch 2.13 gave it a new name, and warns at each call of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gathered(rows: Tensor) -> Iterable[Tensor]:
    """The rows of all ranks in one block: fetched once, and held.

    A contrastive loss of n pairs of width d on each of R ranks receives (R - 1) x n x (2 d + 2) numbers per rank.
    """
    block = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    _all_gather(block, rows)
    return [block]


@dataclass(frozen=True)
class Ring:
    """The rows of all ranks, a rank's after the other's: each passes on what it has used to the next, while it uses it.

    No rank holds more than two blocks, but the two passes of a contrastive loss go around twice: of n pairs of width d
    on each of R ranks (R - 1) x n x (4 d + 2) numbers per rank are received.
    """

    rows: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        rank, count = dist.get_rank(), dist.get_world_size()
        block = self.rows
        for _ in range(count - 1):
            coming = torch.empty_like(block)
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, (rank + 1) % count),
                    dist.P2POp(dist.irecv, coming, (rank - 1) % count),
                ]
            )
            yield block
            for transfer in transfers:
                transfer.wait()
            block = coming
        yield block


GATHERS: dict[str, Gather] = {"gathered": gathered, "ring": Ring}
