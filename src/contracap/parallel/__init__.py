"""Many processes that train one model: the process group, the gather of all rows, the sharded model."""

from contracap.parallel.gather import gather_rows
from contracap.parallel.process_group import TIMEOUT, Agreement, ParallelError, ProcessGroup, start_process_group
from contracap.parallel.sharding import (
    Kind,
    ParallelConfig,
    ParallelModel,
    full_tensor,
    parallelize,
    shard_like,
    sharded_modules,
)

__all__ = [
    "TIMEOUT",
    "Agreement",
    "Kind",
    "ParallelConfig",
    "ParallelError",
    "ParallelModel",
    "ProcessGroup",
    "full_tensor",
    "gather_rows",
    "parallelize",
    "shard_like",
    "sharded_modules",
    "start_process_group",
]
