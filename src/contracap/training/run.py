"""A run under way: its steps, and what happens between them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from contracap.data.batch import Batch
from contracap.data.loader import TrainingBatches, join_states
from contracap.data.order import OrderError
from contracap.evaluation.suite import Suite
from contracap.parallel import Agreement
from contracap.training.checkpoint import CHECKPOINTS, CheckpointError, describe_error, last_checkpoint
from contracap.training.loop import Event, TrainingError, repeat_steps
from contracap.training.monitor import Monitor
from contracap.training.recipe import Recipe
from contracap.training.recorder import Recorder
from contracap.training.shutdown import Interrupted, ShutdownRequested, ShutdownSignal
from contracap.training.step import StepConfig, TrainingState
from contracap.training.watchdog import CHECKPOINT, EVALUATION, RECORD
from contracap.training.writer import CheckpointWriter

MAX_FULL_SHARE = 0.05  # of the captions in the first batch may fill the context without a warning
Found = TypeVar("Found")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """The steps of a run, and what happens between them. Every rank makes the same calls in the same order.

    Attributes:
        shutdown: set when the process receives SIGTERM, SIGUSR1 or the first Ctrl-C.
        write_errors: errors of rank 0 while it wrote records. The other ranks hear of them in `stop_if_asked`.
    """

    recipe: Recipe
    state: TrainingState
    batches: TrainingBatches
    monitor: Monitor
    recorder: Recorder
    writer: CheckpointWriter
    shutdown: ShutdownSignal
    agreement: Agreement
    write_errors: list[OSError] = field(default_factory=list)

    def repeat(
        self, config: StepConfig, *, validate: Callable[[], Mapping[str, float]] | None, evaluator: Suite | None
    ) -> None:
        """Train to the last step."""
        recipe, state = self.recipe, self.state
        # With several ranks, recording skips takes a message to all.
        record_skips_every = 1 if state.process_group.world_size == 1 else recipe.log_every
        events = [
            Event(record_skips_every, self.record_skips),
            Event(recipe.log_every, self.log),
            Event(recipe.checkpoint.every, self.save_unless_skipped),
        ]
        if validate:
            events.append(Event(recipe.validate_every, partial(self.validate, validate)))
        if evaluator:
            events.append(Event(recipe.evaluation.every, partial(self.evaluate, evaluator, bf16=config.bf16)))
        events.append(Event(1, self.stop_if_asked))
        start = state.step
        try:
            repeat_steps(
                state, self.checked_batches(), config, monitor=self.monitor, events=events, nonfinite=recipe.nonfinite
            )
        except TrainingError as error:
            self.writer.wait()
            last = last_checkpoint(Path(recipe.out) / CHECKPOINTS)
            remedy = "start a new run with a lower optimizer.learning_rate"
            if last:
                remedy += f" and initialise_from={last}"
            if recipe.nonfinite == "stop":
                remedy = f"resume with nonfinite=skip to leave such steps out, or {remedy}"
            raise TrainingError(f"{error}. Last good checkpoint: {last or 'none yet'}. Remedy: {remedy}") from None
        except ShutdownRequested:  # while it waited for data
            if state.step == start:
                raise
            self.end_early()
        except OrderError:  # on this rank alone: the others are not asked
            self.recorder.record_skips(state.step, self.batches.take_skips())
            counts = {f"skipped/{kind}": float(count) for kind, count in self.batches.skipped.items()}
            self.recorder.record(state.step, counts)
            raise
        with self.monitor.phase(CHECKPOINT):
            self.writer.wait()  # a run whose last checkpoint cannot be written is not a success

    @contextmanager
    def keep_write_errors(self) -> Iterator[None]:
        """Keep an error of writing until the ranks agree what to do."""
        try:
            yield
        except OSError as error:
            self.write_errors.append(error)

    def checked_batches(self) -> Iterator[Batch]:
        """Yield the batches; warn if many captions of the first one fill the context, and are most likely cut."""
        context = self.state.model.config.text.context
        for number, batch in enumerate(self.batches):
            full = int((batch.lengths == context).sum())  # none if captions.max_tokens cuts them earlier
            if number == 0 and self.state.process_group.rank == 0 and full > MAX_FULL_SHARE * len(batch):
                logger.warning(
                    "%d of the first %d captions fill the context of %d tokens and are likely cut: "
                    "raise model.text.context, or take a size that reads longer texts",
                    *(full, len(batch), context),
                )
            yield batch

    def record_skips(self) -> None:
        """Record the samples that were left out since the last call."""
        skips = [skip for skips in self.state.process_group.all_gather(self.batches.take_skips()) for skip in skips]
        with self.keep_write_errors():
            self.recorder.record_skips(self.state.step, skips)

    def log(self) -> None:
        """Record the newest numbers."""
        skipped = sum(map(Counter, self.state.process_group.all_gather(self.batches.skipped)), Counter[str]())
        with self.monitor.phase(RECORD), self.keep_write_errors():
            self.monitor.log({f"skipped/{kind}": float(count) for kind, count in skipped.items()})

    def validate(self, compute: Callable[[], Mapping[str, float]]) -> None:
        """Record the losses on `data.validation`."""
        self.stop_if_asked(at_once=True)  # not only after the validation, which takes a while
        with self.monitor.phase(EVALUATION):
            numbers = self.try_on_all_ranks(compute)
            with self.keep_write_errors():
                self.recorder.record(self.state.step, numbers or {})

    def evaluate(self, evaluator: Suite, *, bf16: bool) -> None:
        """Record the results of the recipe's evaluation."""
        self.stop_if_asked(at_once=True)
        model = self.state.model
        with self.monitor.phase(EVALUATION):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                result = self.try_on_all_ranks(partial(evaluator, model))
            if result is not None:
                with self.keep_write_errors():
                    self.recorder.record(self.state.step, result.values)
                    self.recorder.record_captions(self.state.step, result.predictions)

    def try_on_all_ranks(self, action: Callable[[], Found]) -> Found | None:
        """Return what `action` returns. If it fails on any rank, warn and return None: that does not end the run.

        Under FSDP, a rank that fails leaves the others waiting in a collective; that ends the run.
        """
        found, reason = None, ""
        try:
            found = action()
        except Exception as error:
            reason = describe_error(error)
        for rank, problem in enumerate(self.state.process_group.all_gather(reason)):
            if problem:
                found = None
                if self.state.process_group.rank == 0:
                    logger.warning("no figures at step %d: rank %d: %s", self.state.step, rank, problem)
        return found

    def save_unless_skipped(self) -> None:
        """Begin to write a checkpoint, unless the newest step was skipped.

        A run that diverges would otherwise replace good checkpoints. The last step's checkpoint is always written, and
        so is that of a run that is asked to stop: its weights are those after the last good step.
        """
        if not self.monitor.skipped or self.state.step == self.recipe.steps:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint, after the one before is written."""
        with self.monitor.phase(CHECKPOINT):
            self.record_skips()
            with self.keep_write_errors():
                self.monitor.write_spikes()
            self.writer.save(self.state, join_states(self.state.process_group.all_gather(self.batches.state_dict())))

    def stop_if_asked(self, *, at_once: bool = False) -> None:
        """End the run on every rank if one of them was asked to stop, or cannot write.

        Args:
            at_once: wait for the other ranks' answers; otherwise those of the step before are used.

        Raises:
            CheckpointError: if something could not be written.
            Interrupted: after a checkpoint.
        """
        recipe, process_group = self.recipe, self.state.process_group
        ask = process_group.any if at_once or self.state.step == recipe.steps else self.agreement.ask
        asked, failed = ask(self.shutdown.received, self.writer.failed or bool(self.write_errors))
        if failed:
            self.writer.wait()
            reason = process_group.broadcast(describe_error(self.write_errors[0]) if self.write_errors else "")
            raise make_write_error(Path(recipe.out), reason)
        if asked and self.state.step < recipe.steps:
            self.end_early()

    def end_early(self) -> None:
        """Raises: Interrupted: after a checkpoint."""
        self.save()
        self.writer.wait()
        last = last_checkpoint(Path(self.recipe.out) / CHECKPOINTS)
        done = f"interrupted after step {self.state.step} of {self.recipe.steps}"
        raise Interrupted(f"{done}: {how_to_continue(self.recipe, last)}")


def how_to_continue(recipe: Recipe, last: Path | None) -> str:
    """Tell how to continue an interrupted run from its last checkpoint."""
    if last is None:
        return "the same command begins again"
    return f"the same command{'' if recipe.resume else ' with resume=true'} continues from {last}"


def make_write_error(folder: Path, reason: str) -> CheckpointError:
    """Return the error of a run that can write no more."""
    last = last_checkpoint(folder / CHECKPOINTS) or "none yet"
    return CheckpointError(
        f"{folder}: the run cannot continue: {reason}. Last good checkpoint: {last}. "
        "Put that right, then continue with resume=true"
    )
