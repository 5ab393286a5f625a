"""Speed and memory of the ranks between two records."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from contracap.data.batch import Batch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

GIB = 2**30
Utilisation = Callable[[float, float], float]
"""The share of a device's peak that is used, given samples per second of one device and mean tokens per text."""


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """Counts of one rank since its last record.

    Attributes:
        seconds: time since the last record, including all that happened between the steps.
        waited: seconds of these in which the loop waited for its next batch.
        tokens: tokens of the texts, start and end included, without padding.
        memory: bytes.
        gpu_utilisation: share of the time in which the GPU was busy; None if unknown.
    """

    steps: int
    samples: int
    tokens: int
    seconds: float
    waited: float
    memory: float
    gpu_utilisation: float | None


class Throughput:
    """Counts the samples, tokens and seconds of one rank."""

    def __init__(self, device: torch.device):
        self._device = device
        self._asks_gpu = device.type == "cuda"
        self._forget()

    def _forget(self) -> None:
        self._since = time.monotonic()
        self._steps = self._samples = self._tokens = 0
        self._waited = 0.0

    def count_wait(self, seconds: float) -> None:
        """Count time in which the loop had no batch."""
        self._waited += seconds

    def count_step(self, batch: Batch) -> None:
        """Count a step on this batch."""
        self._steps += 1
        self._samples += len(batch)
        self._tokens += int(batch.lengths.sum())

    def take(self) -> RankCounts:
        """Return the counts since the last call, and start again."""
        measured = RankCounts(
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
        """Return the peak of tensors since the last call on CUDA, elsewhere the peak resident memory of the process."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return float(peak)
        if resource is None:
            return math.nan
        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def _gpu_utilisation(self) -> float | None:
        """Return what the driver reports for the last moment. After a failure, it is not asked again."""
        if self._asks_gpu:
            try:
                return torch.cuda.utilization(self._device) / 100
            except Exception:  # nvidia-ml-py is missing, or says in errors of its own that the device cannot tell
                self._asks_gpu = False
        return None


def summarise(reports: Sequence[RankCounts], utilisation: Utilisation | None) -> dict[str, float]:
    """Return the figures of all ranks together.

    `samples_per_second`, `tokens_per_second` and, with `utilisation`, `mfu` are totals; `data_wait_share` and
    `memory_gib` are those of the rank with the most; `gpu_utilisation` is the mean, if all ranks know theirs. There are
    no rates if a clock has jumped.
    """
    seconds = max(report.seconds for report in reports)
    samples, tokens = sum(report.samples for report in reports), sum(report.tokens for report in reports)
    found = {"memory_gib": max(report.memory for report in reports) / GIB}
    trusted = all(0 <= report.waited <= report.seconds and report.seconds > 0 for report in reports)
    if trusted:  # else a clock has jumped, as when a virtual machine moves
        found |= {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": max(report.waited / report.seconds for report in reports),
        }
    if trusted and utilisation is not None:
        found["mfu"] = utilisation(samples / seconds / len(reports), tokens / samples)
    shares = [report.gpu_utilisation for report in reports if report.gpu_utilisation is not None]
    if len(shares) == len(reports):
        found["gpu_utilisation"] = sum(shares) / len(shares)
    return found
