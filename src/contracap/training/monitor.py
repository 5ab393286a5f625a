"""What one rank sees of its own run, put together with the others' when a record is written."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace

from contracap.data.batch import Batch
from contracap.parallel import ProcessGroup
from contracap.training.meter import Meter, Utilisation, figures
from contracap.training.metrics import SPIKES_FILE, Recorder
from contracap.training.profiling import Profile
from contracap.training.spikes import Spike, Spikes
from contracap.training.watchdog import DATA, STEP, Watchdog

QUIET = 100  # steps without a further warning after one of a spike
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
        self._meter = Meter(process_group.device)
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
