"""Machines and workers of a run over many shards. Imports no torch, as the command line makes its flags from this."""

from dataclasses import dataclass

from contracap.config import require_count

CORES = 4  # for each worker without a GPU, unless the number of workers is given


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Machines and workers of a run."""

    address: str | None = None
    """Address of a Ray cluster, or `auto` for the one that this machine belongs to. By default Ray starts here."""
    workers: int | None = None
    """Processes that each hold the model. The default is one for each GPU, or else one for every 4 cores."""
    gpus_per_worker: float | None = None
    """GPUs of each worker: 0, 1 or a share of one. The default is 1 where there are GPUs."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            require_count("workers", self.workers, 1, "processes that each hold the model", most=100_000)
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}; it must be from 0 to 1")
