"""The trainer: a recipe in, a run folder out."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch

from contracap.config import to_dict, to_toml
from contracap.data.batch import Batch
from contracap.data.loader import TrainingBatches, joined_states
from contracap.data.order import OrderError
from contracap.data.remote import require_consent
from contracap.evaluation.result import Evaluator, Result
from contracap.evaluation.suite import build_suite
from contracap.files import write_text
from contracap.parallel import Agreement, ParallelError, ProcessGroup, start_process_group, wrapped
from contracap.pretrained import load, processor_for
from contracap.training.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_name,
    describe,
    last_checkpoint,
    moving_average,
    restore_checkpoint,
)
from contracap.training.folder import locked
from contracap.training.health import (
    CHECKPOINT,
    EVALUATION,
    RECORD,
    Interrupted,
    ShutdownRequested,
    ShutdownSignal,
    Watchdog,
    shutdown_signal,
)
from contracap.training.logging import Profile, Recorder, open_loggers, require_wandb
from contracap.training.loop import Event, TrainingError, repeat_steps
from contracap.training.monitor import Monitor
from contracap.training.optimizer import build_optimizer, freeze, freeze_unused
from contracap.training.recipe import RECIPE_FILE, Recipe, in_steps
from contracap.training.start import check_inputs, device_of, precision_on, require_same_run, starting_model
from contracap.training.step import StepConfig, TrainingState
from contracap.training.utilisation import ModelUtilisation, find_peak
from contracap.training.validation import require_validation, validation_losses
from contracap.training.writer import CheckpointWriter

MAX_FULL_SHARE = 0.05  # of the first captions may fill the context without a warning
Found = TypeVar("Found")
logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, allow_commands: bool = False) -> Path:
    """Train to the recipe's last step and return the newest checkpoint. Under `torchrun` the ranks share each batch.

    `allow_commands`: whether the recipe's `pipe:` sources may run; a recipe of strangers could name any command.

    Writes to the run folder: `recipe.toml` (resolved), `metrics.jsonl`, `tensorboard/`, `checkpoints/` with `last`; and
    as there is need `skipped.jsonl`, `spikes.jsonl`, `captions.jsonl`, `profile/`.

    Raises:
        ConfigError: if the recipe reads from commands that are not allowed.
        CheckpointError: if the folder holds a run and `resume` is false, or one of another model; if it can no longer
            be written to.
        TrainingError: at a NaN or infinite loss, unless the recipe skips such steps.
        OrderError: if too much of the data is bad.
        ParallelError: if the ranks cannot be started, or cannot share the batch.
        Interrupted: after a checkpoint, if any of the ranks got SIGTERM or SIGUSR1, or by Ctrl-C.
    """
    require_consent(recipe.commands, allow_commands)
    package = logging.getLogger("contracap")
    if not package.hasHandlers():  # in a notebook or a script nobody would hear of the run
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    with shutdown_signal() as shutdown, start_process_group(device_of(recipe)) as process_group, ExitStack() as stack:
        # One process ends at once where it has nothing to finish. Of several, each waits for the next step of all.
        alone = process_group.world_size == 1
        try:
            with shutdown.at_once(alone):
                _from_rank_0(process_group, lambda: stack.enter_context(locked(Path(recipe.out))))
                return _train(recipe, process_group, shutdown)
        except ShutdownRequested:
            last = last_checkpoint(Path(recipe.out) / CHECKPOINTS)
            raise Interrupted(f"interrupted before a step was done: {_go_on(recipe, last)}") from None


def _train(recipe: Recipe, process_group: ProcessGroup, shutdown: ShutdownSignal) -> Path:
    folder = Path(recipe.out)
    checkpoints = folder / CHECKPOINTS
    checkpoint = _from_rank_0(process_group, lambda: last_checkpoint(checkpoints))
    if checkpoint and not recipe.resume:
        raise CheckpointError(
            f"{folder} already holds a run, up to {checkpoint.name}: resume=true continues, or choose another out"
        )
    world_size = process_group.world_size
    if recipe.data.batch_size % (world_size * recipe.accumulation):
        raise ParallelError(
            f"data.batch_size {recipe.data.batch_size} cannot be shared by {world_size} ranks in parts of "
            f"accumulation {recipe.accumulation}: make it a multiple of {world_size * recipe.accumulation}"
        )
    check_inputs(recipe, world_size)
    recipe = in_steps(recipe)
    recipe = replace(recipe, precision=precision_on(process_group.device, recipe.precision))
    if checkpoint:
        before = require_same_run(folder, recipe)
        if before is not None and before.steps != recipe.steps:
            logger.info("steps was %s and is now %s: the schedule is stretched", before.steps, recipe.steps)
        model, processor = load(checkpoint)
        image = processor.image_config
    else:
        model, image = starting_model(recipe)
    config = StepConfig(
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        image=image,
        total_steps=recipe.steps,
        bf16=recipe.precision == "bf16",
        accumulation=recipe.accumulation,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
    )
    processor = processor_for(model.config, image)
    freeze(model, recipe.frozen)
    freeze_unused(model, recipe.loss)
    model.to(process_group.device)
    shared = wrapped(model, recipe.parallel, process_group, bf16=config.bf16)
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer),
        average=moving_average(model) if recipe.ema_decay else None,
        process_group=process_group,
        wrapped=shared,
    )
    batches = TrainingBatches(
        recipe.data,
        image=image,
        tokenizer=processor.tokenizer,
        seed=recipe.seed,
        rank=process_group.rank,
        ranks=world_size,
        waiting=shutdown.at_once if world_size == 1 else nullcontext,
    )
    # Wrong paths are found now, not hours later.
    require_wandb(recipe.wandb)
    validate = None
    if recipe.validate_every:
        require_validation(recipe.data)
        validate = partial(
            validation_losses, model, data=recipe.data, config=config, process_group=process_group, shared=shared
        )
    suite = build_suite(recipe.evaluation, processor, process_group)
    if checkpoint:
        batches.load_state_dict(restore_checkpoint(checkpoint, state))
        if state.step > recipe.steps:
            raise CheckpointError(
                f"{checkpoint} is already at step {state.step}, beyond the recipe's {recipe.steps} steps"
            )
        logger.info("going on from %s", checkpoint)
    if process_group.rank == 0:
        logger.info("%s", _described(recipe, model, batches.samples, process_group))
    peak = find_peak(process_group.device, bf16=config.bf16, stated=recipe.peak_tflops)
    utilisation = ModelUtilisation(model, recipe.loss, peak) if peak else None
    steps = {"start": state.step, "total_steps": recipe.steps}
    process_group.barrier()  # all have looked at what the folder held before it changes
    with (
        shutdown.at_once(False),
        CheckpointWriter(checkpoints, recipe.checkpoint, image=image, process_group=process_group) as writer,
        _recorder(recipe, state) as recorder,
        Watchdog(recipe.stall_seconds, process_group, start=state.step) as watchdog,
        Monitor(
            recorder,
            process_group,
            watchdog=watchdog,
            profile=Profile(folder, rank=process_group.rank, steps=recipe.steps - state.step)
            if recipe.profile
            else None,
            utilisation=utilisation,
            **steps,
        ) as monitor,
    ):
        run = _Run(
            recipe=recipe,
            state=state,
            batches=batches,
            monitor=monitor,
            recorder=recorder,
            writer=writer,
            shutdown=shutdown,
            agreement=Agreement(process_group),
        )
        if utilisation:
            logger.info("%s", utilisation)
            with run.recording():
                recorder.record(state.step, {"mfu_peak_tflops": utilisation.peak.flops / 1e12})
        run.repeat(config, validate=validate, suite=suite)
    return checkpoints / checkpoint_name(recipe.steps)


def _from_rank_0(process_group: ProcessGroup, action: Callable[[], Found]) -> Found:
    """What the action gives on rank 0, which alone does it: what others see of a network's folder may be older.

    Raises: CheckpointError: on every rank, if it does there.
    """
    found, problem = None, None
    if process_group.rank == 0:
        try:
            found = action()
        except CheckpointError as error:
            problem = error
    found, problem = process_group.broadcast((found, problem))
    if problem is not None:
        raise problem
    return cast(Found, found)


def _described(recipe: Recipe, model: torch.nn.Module, samples: int, process_group: ProcessGroup) -> str:
    """What is trained, on what and where."""
    parameters = list(model.parameters())
    total, trained = (
        sum(each.numel() for each in parameters if each.requires_grad or frozen) / 1e6 for frozen in (True, False)
    )
    ranks = f", {process_group.world_size} ranks" if process_group.world_size > 1 else ""
    batch, total, trained = recipe.data.batch_size, f"{total:,.1f}", f"{trained:,.1f}"
    return (
        f"{recipe.size}: {total} million parameters{f' ({trained} trained)' if trained != total else ''}\n"
        f"data: {samples:,} samples, batch {batch:,}, {samples / batch:,.1f} steps an epoch\n"
        f"run: {recipe.steps:,} steps, {recipe.steps * batch / samples:,.1f} epochs, in {recipe.out}\n"
        f"device: {process_group.device}{ranks}, precision {recipe.precision}"
    )


def _go_on(recipe: Recipe, last: Path | None) -> str:
    """How to continue an interrupted run."""
    if last is None:
        return "the same command begins again"
    return f"the same command{'' if recipe.resume else ' with resume=true'} continues from {last}"


def _recorder(recipe: Recipe, state: TrainingState) -> Recorder:
    """Begin the run's records, with its recipe."""
    if state.process_group.rank:
        return Recorder(None, start=state.step, total_steps=recipe.steps)
    folder = Path(recipe.out)
    try:
        write_text(folder / RECIPE_FILE, to_toml(recipe))
        loggers = open_loggers(folder, start=state.step, wandb=recipe.wandb, settings=to_dict(recipe))
        return Recorder(folder, loggers=loggers, start=state.step, total_steps=recipe.steps)
    except OSError as error:
        raise _stopped(folder, describe(error)) from None


@dataclass(kw_only=True)
class _Run:
    """The steps, and what happens between them; every rank does the same in the same order.

    Attributes:
        shutdown: set when the process receives SIGTERM, SIGUSR1 or the first Ctrl-C.
        trouble: that rank 0 has with its records; the others hear of it when they agree.
    """

    recipe: Recipe
    state: TrainingState
    batches: TrainingBatches
    monitor: Monitor
    recorder: Recorder
    writer: CheckpointWriter
    shutdown: ShutdownSignal
    agreement: Agreement
    trouble: list[OSError] = field(default_factory=list)

    def repeat(
        self, config: StepConfig, *, validate: Callable[[], Mapping[str, float]] | None, suite: Evaluator | None
    ) -> None:
        """Train to the last step."""
        recipe, state, checkpoints = self.recipe, self.state, Path(self.recipe.out) / CHECKPOINTS
        events = [
            Event(
                1 if state.process_group.world_size == 1 else recipe.log_every, self.skipping
            ),  # with several a message to all
            Event(recipe.log_every, self.log),
            Event(recipe.checkpoint.every, self.checkpointing),
        ]
        if validate:
            events.append(Event(recipe.validate_every, partial(self.validating, validate)))
        if suite:
            events.append(Event(recipe.evaluation.every, partial(self.evaluating, suite, bf16=config.bf16)))
        events.append(Event(1, self.agreeing))
        start = state.step
        try:
            repeat_steps(
                state, self.watched_batches(), config, monitor=self.monitor, events=events, nonfinite=recipe.nonfinite
            )
        except TrainingError as error:
            self.writer.wait()
            remedy = "Lower optimizer.learning_rate, or say nonfinite=skip to leave such steps out"
            if recipe.nonfinite == "skip":
                remedy = "Point `last` to an earlier one, or lower optimizer.learning_rate in a new run"
            raise TrainingError(
                f"{error}. Last good checkpoint: {last_checkpoint(checkpoints) or 'none yet'}. {remedy}"
            ) from None
        except ShutdownRequested:  # while it waited for data
            if state.step == start:
                raise
            self.end_early()
        except OrderError:  # on this rank alone: the others are not asked
            self.recorder.skips(state.step, self.batches.take_skips())
            counts = {f"skipped/{kind}": float(count) for kind, count in self.batches.skipped.items()}
            self.recorder.record(state.step, counts)
            raise
        with self.monitor.phase(CHECKPOINT):
            self.writer.wait()  # a run whose last one cannot be written is not a success

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what goes wrong until the ranks agree."""
        try:
            yield
        except OSError as error:
            self.trouble.append(error)

    def skipping(self) -> None:
        """Write down the samples that were left out."""
        skips = [skip for skips in self.state.process_group.all_gather(self.batches.take_skips()) for skip in skips]
        with self.recording():
            self.recorder.skips(self.state.step, skips)

    def log(self) -> None:
        """Record the newest numbers."""
        total = sum(map(Counter, self.state.process_group.all_gather(self.batches.skipped)), Counter[str]())
        with self.monitor.phase(RECORD), self.recording():
            self.monitor.log({f"skipped/{kind}": float(number) for kind, number in total.items()})

    def watched_batches(self) -> Iterator[Batch]:
        """The batches. A line says so if many captions of the first fill the context, and are most likely cut."""
        context = self.state.model.config.text.context
        for number, batch in enumerate(self.batches):
            full = int((batch.lengths == context).sum())  # none is so long where captions.max_tokens cuts them earlier
            if number == 0 and self.state.process_group.rank == 0 and full > MAX_FULL_SHARE * len(batch):
                logger.warning(
                    "%d of the first %d captions fill the context of %d tokens and are likely cut: "
                    "raise model.text.context, or take a size that reads longer texts",
                    *(full, len(batch), context),
                )
            yield batch

    def validating(self, validate: Callable[[], Mapping[str, float]]) -> None:
        """Record losses on other pairs."""
        self.agreeing(at_once=True)  # it takes a while
        with self.monitor.phase(EVALUATION):
            numbers = self.measured(validate)
            with self.recording():
                self.recorder.record(self.state.step, numbers or {})

    def evaluating(self, suite: Evaluator, *, bf16: bool) -> None:
        """Record what the recipe wants measured on the way."""
        self.agreeing(at_once=True)
        model = self.state.model
        with self.monitor.phase(EVALUATION):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                result = self.measured(partial(suite, model)) or Result(figures={}, samples=0)
            with self.recording():
                self.recorder.record(self.state.step, result.values)
                self.recorder.captions(self.state.step, result.predictions)

    def measured(self, measure: Callable[[], Found]) -> Found | None:
        """Return what was measured; None, and a warning, if that fails on any rank, which does not end the run.

        A rank that fails while the others wait for it, as those that share a model out do, is lost nevertheless.
        """
        found, reason = None, ""
        try:
            found = measure()
        except Exception as error:
            reason = describe(error)
        for rank, problem in enumerate(self.state.process_group.all_gather(reason)):
            if problem:
                found = None
                if self.state.process_group.rank == 0:
                    logger.warning("no figures at step %d: rank %d: %s", self.state.step, rank, problem)
        return found

    def checkpointing(self) -> None:
        """Begin to write a checkpoint, unless the newest step was skipped.

        A run that has gone astray would push good ones out. The last step's is written in any case, and so is that of
        a run that is asked to end: its weights are those after the last good step.
        """
        if not self.monitor.skipped or self.state.step == self.recipe.steps:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint; the one before is whole by then."""
        with self.monitor.phase(CHECKPOINT):
            self.skipping()
            with self.recording():
                self.monitor.write_spikes()
            self.writer.save(self.state, joined_states(self.state.process_group.all_gather(self.batches.state_dict())))

    def agreeing(self, *, at_once: bool = False) -> None:
        """End the run on every rank if one of them was asked to, or cannot write. What another rank says is heard a
        step later, or `at_once`, which waits for the others.

        Raises:
            CheckpointError: if something could not be written.
            Interrupted: after a checkpoint.
        """
        recipe, process_group = self.recipe, self.state.process_group
        ask = process_group.any if at_once or self.state.step == recipe.steps else self.agreement.ask
        asked, failed = ask(self.shutdown.received, self.writer.failed or bool(self.trouble))
        if failed:
            self.writer.wait()
            reason = process_group.broadcast(describe(self.trouble[0]) if self.trouble else "")
            raise _stopped(Path(recipe.out), reason)
        if asked and self.state.step < recipe.steps:
            self.end_early()

    def end_early(self) -> None:
        """Raises: Interrupted: after a checkpoint."""
        self.save()
        self.writer.wait()
        last = last_checkpoint(Path(self.recipe.out) / CHECKPOINTS)
        done = f"interrupted after step {self.state.step} of {self.recipe.steps}"
        raise Interrupted(f"{done}: {_go_on(self.recipe, last)}")


def _stopped(folder: Path, reason: str) -> CheckpointError:
    last = last_checkpoint(folder / CHECKPOINTS) or "none yet"
    return CheckpointError(
        f"{folder}: the run cannot continue: {reason}. Last good checkpoint: {last}. "
        "Put that right, then continue with resume=true"
    )
