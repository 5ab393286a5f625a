"""Many processes that train one model: the process group, the gather of all rows, the sharded model."""

from contracap.parallel.gather import gather_rows
from contracap.parallel.process_group import TIMEOUT, Agreement, ParallelError, ProcessGroup, start_process_group
from contracap.parallel.sharing import Kind, ParallelConfig, Wrapped, share_like, units, whole, wrapped

__all__ = [
    "TIMEOUT",
    "Agreement",
    "Kind",
    "ParallelConfig",
    "ParallelError",
    "ProcessGroup",
    "Wrapped",
    "gather_rows",
    "share_like",
    "start_process_group",
    "units",
    "whole",
    "wrapped",
]
