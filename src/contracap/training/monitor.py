"""Monitoring of one rank: its speed, and its unusual steps."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace

from contracap.data.batch import Batch
from contracap.parallel import ProcessGroup
from contracap.training.profiling import Profile
from contracap.training.recorder import SPIKES_FILE, Recorder
from contracap.training.spikes import Spike, Spikes
from contracap.training.throughput import Throughput, Utilisation, summarise
from contracap.training.watchdog import DATA, STEP, Watchdog

QUIET = 100  # steps after the warning of a spike in which there is no other
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
        self._throughput = Throughput(process_group.device)
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
                self._recorder.record_spike(asdict(spike))
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
            self._throughput.count_wait(time.monotonic() - since)
            self._watchdog.enter(STEP)
            yield batch

    def step(self, numbers: Mapping[str, float], batch: Batch) -> None:
        """Note that a step on this rank's batch is done; `numbers` is empty if it was skipped."""
        self._done += 1
        self._watchdog.step(self._done)
        self._throughput.count_step(batch)
        self._numbers = numbers
        self._skipped += not numbers
        self._recorder.show_progress()
        if self._profile is not None:
            self._profile.step()
        if numbers and (spike := self._spikes.find(self._done, numbers, batch.keys)):
            self._keep(spike)

    def note_not_finite(self, reason: str, batch: Batch, *, stops: bool) -> None:
        """Note that the current step has numbers that are NaN or infinite.

        Args:
            stops: this step ends the run.
        """
        self._keep(self._spikes.make_not_finite(self._done + 1, reason, batch.keys))
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
            self._recorder.record_spike(asdict(replace(spike, keys=keys[spike.step])))
        self._unwritten = []

    def log(self, counts: Mapping[str, float]) -> None:
        """Record the newest numbers, `counts`, and speed and memory since the last record. Every rank must call it."""
        reports = self._process_group.all_gather((self._throughput.take(), self._unwritten))
        measured = [each for each, _ in reports]
        self._write([spikes for _, spikes in reports])
        skipped = {"skipped_steps": float(self._skipped)} if self._skipped else {}
        self._skipped = 0
        left = max(0.0, measured[0].seconds) / measured[0].steps * (self._total - self._done)
        self._recorder.record(
            self._done, {**self._numbers, **skipped, **counts, **summarise(measured, self._utilisation)}, left
        )
