"""Many processes that train one model: the process group, the gather of all rows, the sharded model."""

from contracap.parallel.gather import GATHERS, Ring, gathered
from contracap.parallel.process_group import TIMEOUT, ParallelError, ProcessGroup, start_process_group
from contracap.parallel.sharing import Kind, ParallelConfig, Wrapped, share_like, units, whole, wrapped

__all__ = [
    "GATHERS",
    "TIMEOUT",
    "Kind",
    "ParallelConfig",
    "ParallelError",
    "ProcessGroup",
    "Ring",
    "Wrapped",
    "gathered",
    "share_like",
    "start_process_group",
    "units",
    "whole",
    "wrapped",
]
