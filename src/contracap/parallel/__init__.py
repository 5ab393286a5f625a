"""Many processes that train one model: the ranks, the rows of all of them, the model as they share it."""

from contracap.parallel.gather import gather_rows
from contracap.parallel.ranks import TIMEOUT, Agreement, ParallelError, Ranks, started
from contracap.parallel.sharing import Kind, ParallelConfig, Wrapped, share_like, units, whole, wrapped

__all__ = [
    "TIMEOUT",
    "Agreement",
    "Kind",
    "ParallelConfig",
    "ParallelError",
    "Ranks",
    "Wrapped",
    "gather_rows",
    "share_like",
    "started",
    "units",
    "whole",
    "wrapped",
]
