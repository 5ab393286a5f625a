"""The trainer: a recipe in, a run folder out."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from contracap.config import to_dict, to_toml
from contracap.data.loader import TrainingBatches
from contracap.data.patterns import require_consent
from contracap.evaluation.suite import build_suite
from contracap.files import write_text
from contracap.images import ImageConfig
from contracap.model.coca import CoCa
from contracap.parallel import Agreement, ParallelError, ProcessGroup, parallelize, start_process_group
from contracap.pretrained import load, processor_for
from contracap.pretrained.errors import WeightsError
from contracap.training.checkpoint import (
    CHECKPOINTS,
    LAST,
    CheckpointError,
    checkpoint_name,
    checkpoint_steps,
    describe_error,
    last_checkpoint,
    moving_average,
    restore_checkpoint,
)
from contracap.training.initial_model import initial_model
from contracap.training.loggers import open_loggers, require_wandb
from contracap.training.monitor import Monitor
from contracap.training.optimizer import build_optimizer, group_factors
from contracap.training.parts import changes_retrieval, describe_parts, freeze, freeze_unused
from contracap.training.profiling import Profile
from contracap.training.recipe import RECIPE_FILE, Recipe, with_absolute_paths, with_steps
from contracap.training.recorder import Recorder
from contracap.training.run import Run, how_to_continue, make_write_error
from contracap.training.run_folder import lock_folder
from contracap.training.shutdown import Interrupted, ShutdownRequested, ShutdownSignal, shutdown_signal
from contracap.training.start import check_inputs, device_of, precision_on, require_same_run
from contracap.training.step import StepConfig, TrainingState
from contracap.training.utilisation import ModelUtilisation, find_peak
from contracap.training.validation import require_validation, validation_losses
from contracap.training.watchdog import Watchdog
from contracap.training.writer import CheckpointWriter

Found = TypeVar("Found")
logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, allow_commands: bool = False) -> Path:
    """Train to the recipe's last step and return the newest checkpoint. Under `torchrun` the ranks share each batch.

    Writes to the run folder: `recipe.toml` (resolved), `metrics.jsonl`, `tensorboard/`, `checkpoints/` with `last`, and
    if there is something to write, `skipped.jsonl`, `spikes.jsonl`, `captions.jsonl` and `profile/`.

    Args:
        allow_commands: let the recipe's `pipe:` sources run. A recipe from a stranger could name any command.

    Raises:
        ConfigError: if the recipe reads from commands that are not allowed.
        CheckpointError: if the folder holds a run and `resume` is false, or one of another model; if it can no longer
            be written to.
        TrainingError: at a NaN or infinite loss, unless the recipe skips such steps.
        OrderError: if too much of the data is bad.
        ParallelError: if the ranks cannot be started, or cannot share the batch.
        Interrupted: after a checkpoint, if any of the ranks received SIGTERM or SIGUSR1, or Ctrl-C was pressed.
    """
    require_consent(recipe.commands, allow_commands)
    package = logging.getLogger("contracap")
    if not package.hasHandlers():  # in a notebook or a script, which would show nothing of the run
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    with shutdown_signal() as shutdown, start_process_group(device_of(recipe)) as process_group, ExitStack() as stack:
        # A single process ends at once while it has nothing to finish. Several wait for the next step of all.
        single = process_group.world_size == 1
        try:
            with shutdown.at_once(single):
                _from_rank_0(process_group, lambda: stack.enter_context(lock_folder(Path(recipe.out))))
                return _train(recipe, process_group, shutdown)
        except ShutdownRequested:
            last = last_checkpoint(Path(recipe.out) / CHECKPOINTS)
            raise Interrupted(f"interrupted before a step was done: {how_to_continue(recipe, last)}") from None


def _train(recipe: Recipe, process_group: ProcessGroup, shutdown: ShutdownSignal) -> Path:
    checkpoint = _from_rank_0(process_group, lambda: _checkpoint_to_resume(recipe))
    _require_shared_batch(recipe, process_group.world_size)
    check_inputs(recipe, process_group.world_size)
    recipe = with_steps(recipe)
    recipe = replace(recipe, precision=precision_on(process_group.device, recipe.precision))
    model, image = _resumed_model(recipe, checkpoint) if checkpoint else initial_model(recipe)
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
    state = _build_state(recipe, model, process_group, bf16=config.bf16)
    processor = processor_for(model.config, image)
    batches = TrainingBatches(
        recipe.data,
        image=image,
        tokenizer=processor.tokenizer,
        seed=recipe.seed,
        rank=process_group.rank,
        world_size=process_group.world_size,
        waiting=shutdown.at_once if process_group.world_size == 1 else nullcontext,
    )
    # Everything that a later step reads or needs is looked for now, not hours later.
    require_wandb(recipe.wandb)
    validate = None
    if recipe.validate_every:
        require_validation(recipe.data)
        validate = partial(validation_losses, state, config, recipe.data)
    evaluator = build_suite(recipe.evaluation, processor, process_group)
    if checkpoint:
        _resume(recipe, checkpoint, state, batches)
    if process_group.rank == 0:
        logger.info("%s", _describe(recipe, model, batches.samples, process_group))
        _warn(recipe, model, batches.samples)
        if state.step == recipe.steps:
            logger.info("the run is complete: there is nothing left to do")
    process_group.barrier()  # no rank changes the folder before all have read it
    with shutdown.at_once(False), _open_run(recipe, config, state, batches, shutdown) as run:
        run.repeat(config, validate=validate, evaluator=evaluator)
    return Path(recipe.out) / CHECKPOINTS / checkpoint_name(recipe.steps)


@contextmanager
def _open_run(
    recipe: Recipe, config: StepConfig, state: TrainingState, batches: TrainingBatches, shutdown: ShutdownSignal
) -> Iterator[Run]:
    """A context with the run, its records, its checkpoint writer and its watchdog."""
    process_group, folder = state.process_group, Path(recipe.out)
    peak = find_peak(process_group.device, bf16=config.bf16, stated=recipe.peak_tflops)
    utilisation = ModelUtilisation(state.model, recipe.loss, peak) if peak else None
    left = recipe.steps - state.step
    with (
        CheckpointWriter(
            folder / CHECKPOINTS, recipe.checkpoint, image=config.image, process_group=process_group
        ) as writer,
        _open_recorder(recipe, state) as recorder,
        Watchdog(recipe.stall_seconds, process_group, start=state.step) as watchdog,
        Monitor(
            recorder,
            process_group,
            watchdog=watchdog,
            profile=Profile(folder, rank=process_group.rank, steps=left) if recipe.profile else None,
            utilisation=utilisation,
            start=state.step,
            total_steps=recipe.steps,
        ) as monitor,
    ):
        run = Run(
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
            with run.keep_write_errors():
                recorder.record(state.step, {"mfu_peak_tflops": utilisation.peak.flops / 1e12})
        yield run


def _from_rank_0(process_group: ProcessGroup, action: Callable[[], Found]) -> Found:
    """Return the result of `action` on rank 0, the only rank that runs it: other ranks may see an older state of a
    network folder.

    Raises: CheckpointError: on every rank, if the action raises it.
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


def _checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """Return the last checkpoint in the run folder, if there is one.

    Raises: CheckpointError: if there is one, and the recipe does not resume.
    """
    folder = Path(recipe.out)
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint and not recipe.resume:
        raise CheckpointError(
            f"{folder} already holds a run, up to {checkpoint.name}: resume=true continues, or choose another out"
        )
    return checkpoint


def _require_shared_batch(recipe: Recipe, world_size: int) -> None:
    """Raises: ParallelError: if the ranks cannot share the batch equally."""
    if recipe.data.batch_size % (world_size * recipe.accumulation):
        raise ParallelError(
            f"data.batch_size {recipe.data.batch_size} cannot be shared by {world_size} ranks in parts of "
            f"accumulation {recipe.accumulation}: make it a multiple of {world_size * recipe.accumulation}"
        )


def _resumed_model(recipe: Recipe, checkpoint: Path) -> tuple[CoCa, ImageConfig]:
    """Return the model of a checkpoint, if the recipe is that of its run."""
    before = require_same_run(Path(recipe.out), recipe)
    if before is not None and before.steps != recipe.steps:
        logger.info("steps was %s and is now %s: the schedule is stretched", before.steps, recipe.steps)
    try:
        model, processor = load(checkpoint, device="cpu", precision="fp32")
    except WeightsError as error:
        raise CheckpointError(f"{error}{_older_checkpoints(checkpoint)}") from None
    return model, processor.image_config


def _resume(recipe: Recipe, checkpoint: Path, state: TrainingState, batches: TrainingBatches) -> None:
    """Continue from a checkpoint, whose weights the model already has."""
    try:
        batches.load_state_dict(restore_checkpoint(checkpoint, state))
    except (CheckpointError, WeightsError) as error:
        raise CheckpointError(f"{error}{_older_checkpoints(checkpoint)}") from None
    if state.step > recipe.steps:
        raise CheckpointError(f"{checkpoint} is already at step {state.step}, beyond the recipe's {recipe.steps} steps")
    logger.info("resuming from %s", checkpoint)


def _older_checkpoints(checkpoint: Path) -> str:
    """Tell how to resume from an earlier checkpoint, if there is one."""
    folder = checkpoint.parent
    older = [name for name in map(checkpoint_name, checkpoint_steps(folder)) if name < checkpoint.name]
    return f". To resume from the one before: ln -sfn {older[-1]} {folder / LAST}" if older else ""


def _build_state(recipe: Recipe, model: CoCa, process_group: ProcessGroup, *, bf16: bool) -> TrainingState:
    """Freeze the model, move it to its device, spread it over the ranks, and build its optimizer."""
    freeze(model, recipe.frozen)
    freeze_unused(model, recipe.loss)
    model.to(process_group.device)
    parallel = parallelize(model, recipe.parallel, process_group, bf16=bf16)
    optimizer = build_optimizer(model, recipe.optimizer)
    return TrainingState(
        model=model,
        optimizer=optimizer,
        learning_rate_factors=group_factors(model, optimizer, recipe.optimizer),
        average=moving_average(model) if recipe.ema_decay else None,
        process_group=process_group,
        parallel=parallel,
    )


def _describe(recipe: Recipe, model: CoCa, samples: int, process_group: ProcessGroup) -> str:
    """Describe the model, what of it trains, its data and its device, a line each."""
    total = sum(parameter.numel() for parameter in model.parameters())
    ranks = f", {process_group.world_size} ranks" if process_group.world_size > 1 else ""
    batch = recipe.data.batch_size
    data = f"{samples:,} samples, batch {batch:,}"
    if recipe.data.captions.use == "all":  # how many captions an epoch has is known after it
        data, epochs = f"{data}, each with all of its captions", ""
    else:
        data, epochs = (
            f"{data}, {samples / batch:,.1f} steps an epoch",
            f", {recipe.steps * batch / samples:,.1f} epochs",
        )
    return "\n".join(
        [
            f"{recipe.size}: {total / 1e6:,.1f} million parameters",
            *describe_parts(model, recipe.optimizer.learning_rate_factors),
            f"data: {data}",
            f"run: {recipe.steps:,} steps{epochs}, in {recipe.out}",
            f"device: {process_group.device}{ranks}, precision {recipe.precision}",
        ]
    )


def _warn(recipe: Recipe, model: CoCa, samples: int) -> None:
    """Warn of settings that are allowed, but probably mistakes."""
    if recipe.data.validation is not None and not recipe.validate_every:
        logger.warning("data.validation is set, but validate_every is 0: nothing will be validated")
    if recipe.loss.contrastive and recipe.data.batch_size > samples:
        logger.warning(
            "data.batch_size %s exceeds the %s samples: the contrastive loss will take copies of an image for others",
            f"{recipe.data.batch_size:,}",
            f"{samples:,}",
        )
    if model.decoder is not None and not recipe.loss.captioning:
        logger.warning("loss.captioning is 0: the decoder is not trained, so the model cannot caption afterwards")
    if not recipe.loss.contrastive and recipe.initialise_from is not None and changes_retrieval(model):
        logger.warning(
            "loss.contrastive is 0 and the encoders train: the model will retrieve and classify worse afterwards. "
            "frozen = ['image', 'pooler', 'text'] keeps that exactly; loss.contrastive = 1 goes on training it"
        )


def _open_recorder(recipe: Recipe, state: TrainingState) -> Recorder:
    """Write the recipe to the run folder, and open the run's records there; on ranks but 0, record nothing."""
    if state.process_group.rank:
        return Recorder(None, start=state.step, total_steps=recipe.steps)
    folder = Path(recipe.out)
    try:
        write_text(folder / RECIPE_FILE, to_toml(with_absolute_paths(recipe)))
        loggers = open_loggers(folder, start=state.step, wandb=recipe.wandb, settings=to_dict(recipe))
        return Recorder(folder, loggers=loggers, start=state.step, total_steps=recipe.steps)
    except OSError as error:
        raise make_write_error(folder, describe_error(error)) from None
