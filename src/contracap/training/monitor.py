"""Monitoring of one rank: its speed, its memory, and its unusual steps."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace

import torch

from contracap.data.batch import Batch
from contracap.parallel import ProcessGroup
from contracap.training.profiling import Profile
from contracap.training.recorder import SPIKES_FILE, Recorder
from contracap.training.spikes import Spike, Spikes
from contracap.training.watchdog import DATA, STEP, Watchdog

try:
    import resource
except ImportError:  # not on Windows
    resource = None

QUIET = 100  # steps after the warning of a spike in which there is no other
Utilisation = Callable[[float, float], float]
"""The share of a device's peak that is used, given samples per second of one device and mean tokens per text."""
logger = logging.getLogger(__name__)


class Monitor:
    """Sees every batch and every step of this rank.

    It sends messages to other ranks in `log` and `write_spikes`, and when a step that is not finite stops the run.
    """

    def __init__(
        self,
        recorder: Recorder,
        process_group: ProcessGroup,
        *,
        watchdog: Watchdog,
        profile: Profile | None,
        utilisation: Utilisation | None,
        start: int,
        total_steps: int,
    ):
        """Every rank must create one.

        Args:
            utilisation: None if the peak of the device is not known.
            start: steps done before.
        """
        self._recorder, self._process_group = recorder, process_group
        self._watchdog, self._profile, self._utilisation = watchdog, profile, utilisation
        self._meter = Throughput(process_group.device)
        self._done, self._total = start, total_steps
        self._spikes = Spikes()
        self._unwritten: list[Spike] = []
        self._warned: int | None = None
        self._numbers: Mapping[str, float] = {}
        self._skipped = 0

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # the error that ended the run is the one to report
            for spike in self._unwritten:  # with the keys of this rank
                self._recorder.spike(asdict(spike))
        if self._profile is not None:
            self._profile.close()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A context for a phase between two steps."""
        return self._watchdog.phase(name)

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and count the time that they take."""
        iterator = iter(batches)
        while True:
            self._watchdog.enter(DATA)
            since = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._meter.waited(time.monotonic() - since)
            self._watchdog.enter(STEP)
            yield batch

    def step(self, numbers: Mapping[str, float], batch: Batch) -> None:
        """Note that a step on this rank's batch is done; `numbers` is empty if it was skipped."""
        self._done += 1
        self._watchdog.step(self._done)
        self._meter.step(batch)
        self._numbers = numbers
        self._skipped += not numbers
        self._recorder.progress()
        if self._profile is not None:
            self._profile.step()
        if numbers and (spike := self._spikes.look(self._done, numbers, batch.keys)):
            self._keep(spike)

    def not_finite(self, reason: str, batch: Batch, *, stops: bool) -> None:
        """Note that the current step has numbers that are NaN or infinite.

        Args:
            stops: this step ends the run.
        """
        self._keep(self._spikes.not_finite(self._done + 1, reason, batch.keys))
        if stops:
            self.write_spikes()

    @property
    def skipped(self) -> bool:
        """True if the newest step was skipped."""
        return not self._numbers

    def write_spikes(self) -> None:
        """Record the spikes found since the last call. Every rank must call it."""
        self._write(self._process_group.all_gather(self._unwritten))

    def _keep(self, spike: Spike) -> None:
        self._unwritten.append(spike)
        if self._process_group.rank == 0 and (self._warned is None or spike.step - self._warned >= QUIET):
            self._warned = spike.step
            logger.warning("spike at step %d: %s. %s names the samples", spike.step, spike.reason, SPIKES_FILE)

    def _write(self, spikes: list[list[Spike]]) -> None:
        """Record the spikes of all ranks: numbers are equal on all of them, keys are not."""
        keys: dict[int, list[str]] = {}
        for spike in (spike for found in spikes for spike in found):
            keys.setdefault(spike.step, []).extend(spike.keys)
        for spike in spikes[0]:
            self._recorder.spike(asdict(replace(spike, keys=keys[spike.step])))
        self._unwritten = []

    def log(self, counts: Mapping[str, float]) -> None:
        """Record the newest numbers, `counts`, and speed and memory since the last record. Every rank must call it."""
        reports = self._process_group.all_gather((self._meter.take(), self._unwritten))
        measured = [each for each, _ in reports]
        self._write([spikes for _, spikes in reports])
        skipped = {"skipped_steps": float(self._skipped)} if self._skipped else {}
        self._skipped = 0
        left = max(0.0, measured[0].seconds) / measured[0].steps * (self._total - self._done)
        self._recorder.record(
            self._done, {**self._numbers, **skipped, **counts, **figures(measured, self._utilisation)}, left
        )


GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Counts of one rank since its last record.

    Attributes:
        seconds: time since the last record, including whatever happened between the steps.
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

    def waited(self, seconds: float) -> None:
        """Count time in which the loop had no batch."""
        self._waited += seconds

    def step(self, batch: Batch) -> None:
        """Count a step on this batch."""
        self._steps += 1
        self._samples += len(batch)
        self._tokens += int(batch.lengths.sum())

    def take(self) -> Measured:
        """Return the counts since the last call, and start again."""
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


def figures(reports: Sequence[Measured], utilisation: Utilisation | None) -> dict[str, float]:
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
