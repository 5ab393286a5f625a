"""How fast a run goes, and what it takes: counted on each rank, put together when a record is written."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from contracap.data.batch import Batch

GIB = 2**30
# The share of a device's peak that is used, from samples a second of one device and the mean length of their texts.
Utilisation = Callable[[float, float], float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's counts since its last record.

    Attributes:
        seconds: since the last record, whatever came between the steps included.
        waited: seconds of them that the loop waited for its next batch.
        tokens: of the texts, start and end included, without padding.
        memory: bytes.
        gpu_utilisation: share of the time in which the GPU computed; None where nobody can tell.
    """

    steps: int
    samples: int
    tokens: int
    seconds: float
    waited: float
    memory: float
    gpu_utilisation: float | None


class Meter:
    """Counts what one rank does."""

    def __init__(self, device: torch.device):
        self._device = device
        self._asks_gpu = device.type == "cuda"
        self._forget()

    def _forget(self) -> None:
        self._since = time.monotonic()
        self._steps = self._samples = self._tokens = 0
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """The loop had no batch for so long."""
        self._waited += seconds

    def step(self, batch: Batch) -> None:
        """A step is done on this batch."""
        self._steps += 1
        self._samples += len(batch)
        self._tokens += int(batch.lengths.sum())

    def take(self) -> Measured:
        """The counts since the last call."""
        measured = Measured(
            steps=self._steps,
            samples=self._samples,
            tokens=self._tokens,
            seconds=time.monotonic() - self._since,
            waited=self._waited,
            memory=self._memory(),
            gpu_utilisation=self._gpu_utilisation(),
        )
        self._forget()
        return measured

    def _memory(self) -> float:
        """On CUDA the most that tensors took since the last call, else the most that the process ever had resident."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return float(peak)
        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def _gpu_utilisation(self) -> float | None:
        """What the driver says of the last moment; it is not asked again where it does not answer."""
        if self._asks_gpu:
            try:
                return torch.cuda.utilization(self._device) / 100
            except Exception:  # nvidia-ml-py is missing, or says in errors of its own that the device cannot tell
                self._asks_gpu = False
        return None


def figures(ranks: Sequence[Measured], utilisation: Utilisation | None) -> dict[str, float]:
    """What all ranks did together: `samples_per_second`, `tokens_per_second` and, with `utilisation`, `mfu`; of the
    rank with the most, `data_wait_share` and `memory_gib`; `gpu_utilisation` in the mean, if all know theirs. There are
    no rates where a clock has jumped."""
    seconds = max(rank.seconds for rank in ranks)
    samples, tokens = sum(rank.samples for rank in ranks), sum(rank.tokens for rank in ranks)
    found = {"memory_gib": max(rank.memory for rank in ranks) / GIB}
    trusted = all(0 <= rank.waited <= rank.seconds and rank.seconds > 0 for rank in ranks)
    if trusted:  # else a clock has jumped, as that of a machine that was moved
        found |= {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": max(rank.waited / rank.seconds for rank in ranks),
        }
    if trusted and utilisation is not None:
        found["mfu"] = utilisation(samples / seconds / len(ranks), tokens / samples)
    shares = [rank.gpu_utilisation for rank in ranks if rank.gpu_utilisation is not None]
    if len(shares) == len(ranks):
        found["gpu_utilisation"] = sum(shares) / len(shares)
    return found
