"""Many processes that train one model: the ranks, the rows of all of them, the model as they share it."""

from contracap.parallel.gather import GATHERS, Ring, gathered
from contracap.parallel.ranks import TIMEOUT, ParallelError, Ranks, started
from contracap.parallel.sharing import Kind, ParallelConfig, Wrapped, share_like, units, whole, wrapped

__all__ = [
    "GATHERS",
    "TIMEOUT",
    "Kind",
    "ParallelConfig",
    "ParallelError",
    "Ranks",
    "Ring",
    "Wrapped",
    "gathered",
    "share_like",
    "started",
    "units",
    "whole",
    "wrapped",
]
