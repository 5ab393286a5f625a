"""What one rank sees of its own run: its speed, its memory, and steps that are not as usual."""

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
from contracap.training.health import DATA, STEP, Spike, Spikes, Watchdog
from contracap.training.logging import SPIKES_FILE, Profile, Recorder

try:
    import resource
except ImportError:  # not on Windows
    resource = None

QUIET = 100  # steps without a further warning after one of a spike
# The share of a device's peak that is used, from samples a second of one device and the mean length of their texts.
Utilisation = Callable[[float, float], float]
logger = logging.getLogger(__name__)


class Monitor:
    """Sees every batch and every step of this rank. Messages to other ranks happen in `log` and `write_spikes`,
    and where the run stops at a step that is not finite."""

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
        """Every rank must make one.

        Args:
            utilisation: None where the peak of the device is not known.
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
        with suppress(OSError):  # why the run was cut off has been said
            for spike in self._unwritten:  # with the keys of this rank
                self._recorder.spike(asdict(spike))
        if self._profile is not None:
            self._profile.close()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """What the loop does between steps."""
        return self._watchdog.phase(name)

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time they take is counted."""
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
        """A step is done on this rank's batch; `numbers` is empty if it was skipped."""
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
        """The step that would be next has numbers that are NaN or infinite; `stops` if it is the run's last."""
        self._keep(self._spikes.not_finite(self._done + 1, reason, batch.keys))
        if stops:
            self.write_spikes()

    @property
    def skipped(self) -> bool:
        """Whether the newest step was left out."""
        return not self._numbers

    def write_spikes(self) -> None:
        """Write down the spikes that are not yet. Every rank must call it."""
        self._write(self._process_group.all_gather(self._unwritten))

    def _keep(self, spike: Spike) -> None:
        self._unwritten.append(spike)
        if self._process_group.rank == 0 and (self._warned is None or spike.step - self._warned >= QUIET):
            self._warned = spike.step
            logger.warning("spike at step %d: %s. %s names the samples", spike.step, spike.reason, SPIKES_FILE)

    def _write(self, spikes: list[list[Spike]]) -> None:
        """Spikes by rank: the numbers of rank 0, whose steps are everyone's, and the keys of all."""
        keys: dict[int, list[str]] = {}
        for spike in (spike for found in spikes for spike in found):
            keys.setdefault(spike.step, []).extend(spike.keys)
        for spike in spikes[0]:
            self._recorder.spike(asdict(replace(spike, keys=keys[spike.step])))
        self._unwritten = []

    def log(self, counts: Mapping[str, float]) -> None:
        """Record the newest numbers, `counts`, and how the run has gone since the last record. Every rank must call
        it."""
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


class Throughput:
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
        if resource is None:
            return math.nan
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
    """Figures of all ranks together: `samples_per_second`, `tokens_per_second` and, with `utilisation`, `mfu`; of the
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
