"""The trainer: a recipe in, a run folder out."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from contracap.config import to_dict, to_toml
from contracap.data.loader import TrainingBatches, joined_states
from contracap.data.order import OrderError
from contracap.evaluation.suite import Suite
from contracap.files import write_text
from contracap.image import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.weights import WeightsError, interpolate_positions, meta_state, require_same_keys, shapes_of
from contracap.parallel import ParallelError, Ranks, started, wrapped
from contracap.plan.utilisation import ModelUtilisation, find_peak
from contracap.pretrained import load, processor_for, random_model, read_weights
from contracap.recipe import Precision, Recipe, load_recipe
from contracap.training.boards import open_boards
from contracap.training.checkpoint import (
    CheckpointError,
    checkpoint_name,
    last_checkpoint,
    moving_average,
    restore_checkpoint,
    save_checkpoint,
)
from contracap.training.loop import Event, TrainingError, repeat_steps
from contracap.training.metrics import Recorder, Silent
from contracap.training.monitor import Monitor
from contracap.training.optimizer import build_optimizer, freeze
from contracap.training.profiling import Profile
from contracap.training.step import StepConfig, TrainingState
from contracap.training.validation import Validation
from contracap.training.watchdog import CHECKPOINT, EVALUATION, RECORD, Watchdog

RECIPE_FILE = "recipe.toml"
CHECKPOINTS = "checkpoints"
logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> Path:
    """Train to the recipe's last step and return the newest checkpoint. Under `torchrun` the ranks share each batch.

    Writes to the run folder: `recipe.toml` (resolved), `metrics.jsonl`, `tensorboard/`, `checkpoints/` with `last`; and
    as there is need `skipped.jsonl`, `spikes.jsonl`, `captions.jsonl`, `profile/`.

    Raises:
        CheckpointError: if the folder holds a run and `resume` is false, or one of another model.
        TrainingError: at a NaN or infinite loss, unless the recipe skips such steps.
        OrderError: if too much of the data is bad.
        ParallelError: if the ranks cannot be started, or cannot share the batch.
    """
    with started(_device(recipe)) as ranks:
        return _train(recipe, ranks)


def _train(recipe: Recipe, ranks: Ranks) -> Path:
    folder = Path(recipe.out)
    checkpoints = folder / CHECKPOINTS
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint and not recipe.resume:
        raise CheckpointError(
            f"{folder} already holds a run, up to {checkpoint.name}: resume=true goes on, or choose another out"
        )
    if recipe.data.batch_size % (ranks.count * recipe.accumulation):
        raise ParallelError(
            f"data.batch_size {recipe.data.batch_size} cannot be shared by {ranks.count} ranks in parts of "
            f"accumulation {recipe.accumulation}: make it a multiple of {ranks.count * recipe.accumulation}"
        )
    recipe = replace(recipe, precision=precision_on(ranks.device, recipe.precision))
    if checkpoint:
        require_same_run(folder, recipe)
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
    # Wrong paths are found now, not hours later.
    validation = Validation(recipe.data, config) if recipe.data.validation is not None else None
    suite = Suite(recipe.evaluation, processor)
    freeze(model, recipe.frozen)
    freeze(model, [] if recipe.loss.contrastive else model.only_for_contrastive())
    freeze(model, [] if recipe.loss.captioning else model.only_for_captioning())
    model.to(ranks.device)
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer),
        average=moving_average(model) if recipe.ema_decay else None,
        ranks=ranks,
        wrapped=wrapped(model, "ddp", ranks),
    )
    batches = TrainingBatches(
        recipe.data,
        image=image,
        tokenizer=processor.tokenizer,
        seed=recipe.seed,
        rank=ranks.rank,
        ranks=ranks.count,
    )
    if checkpoint:
        batches.load_state_dict(restore_checkpoint(checkpoint, state))
        if state.step > recipe.steps:
            raise CheckpointError(
                f"{checkpoint} is already at step {state.step}, beyond the recipe's {recipe.steps} steps"
            )
        logger.info("going on from %s", checkpoint)
    ranks.wait()  # all have looked at what the folder held before it changes
    if ranks.rank == 0:
        write_text(folder / RECIPE_FILE, to_toml(recipe))
    peak = find_peak(ranks.device, bf16=config.bf16, stated=recipe.peak_tflops)
    utilisation = ModelUtilisation(model, recipe.loss, peak) if peak else None
    steps = {"start": state.step, "total_steps": recipe.steps}
    with (
        Recorder(
            folder,
            boards=open_boards(folder, start=state.step, wandb=recipe.wandb, settings=to_dict(recipe)),
            **steps,
        )
        if ranks.rank == 0
        else Silent() as recorder,
        Watchdog(recipe.stall_seconds, ranks, start=state.step) as watchdog,
        Monitor(
            recorder,
            ranks,
            watchdog=watchdog,
            profile=Profile(folder, rank=ranks.rank, steps=recipe.steps - state.step) if recipe.profile else None,
            utilisation=utilisation,
            end=processor.tokenizer.end,
            **steps,
        ) as monitor,
    ):
        if utilisation:
            logger.info("%s", utilisation)
            recorder.record(state.step, {"mfu_peak_tflops": utilisation.peak.flops / 1e12})

        def skipping() -> None:
            recorder.skips(state.step, [skip for skips in ranks.collect(batches.take_skips()) for skip in skips])

        def counts() -> dict[str, float]:
            total = sum(map(Counter, ranks.collect(batches.skipped)), Counter[str]())
            return {f"skipped/{kind}": float(number) for kind, number in total.items()}

        def log() -> None:
            with monitor.phase(RECORD):
                monitor.log(counts())

        def validating() -> None:
            if ranks.rank == 0 and validation:
                with monitor.phase(EVALUATION):
                    recorder.record(state.step, dict(validation.run(model)))

        def evaluating() -> None:
            if ranks.rank == 0:
                with monitor.phase(EVALUATION), torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.bf16):
                    recorder.record(state.step, dict(suite.run(model)))
                    recorder.captions(state.step, suite.captions)

        def checkpointing() -> None:
            with monitor.phase(CHECKPOINT):
                skipping()
                position = joined_states(ranks.collect(batches.state_dict()))
                if ranks.rank == 0:
                    save_checkpoint(checkpoints, state, image=image, data=position, keep=recipe.checkpoint.keep)
                ranks.wait()

        skip_every = 1 if ranks.count == 1 else recipe.log_every  # with several it takes a message to all
        events = [
            Event(skip_every, skipping),
            Event(recipe.log_every, log),
            Event(recipe.checkpoint.every, checkpointing),
        ]
        if recipe.validate_every:
            events.append(Event(recipe.validate_every, validating))
        if suite:
            events.append(Event(recipe.evaluation.every, evaluating))
        try:
            repeat_steps(state, batches, config, monitor=monitor, events=events, nonfinite=recipe.nonfinite)
        except TrainingError as error:
            raise TrainingError(
                f"{error}. Last good checkpoint: {last_checkpoint(checkpoints) or 'none yet'}. "
                "Lower optimizer.peak_rate, or say nonfinite=skip to leave such steps out"
            ) from None
        except OrderError:  # on this rank alone: the others are not asked
            recorder.skips(state.step, batches.take_skips())
            recorder.record(state.step, {f"skipped/{kind}": float(count) for kind, count in batches.skipped.items()})
            raise
    return checkpoints / checkpoint_name(recipe.steps)


# What a resumed run may change: none of it changes the updates, but for `steps`, which draws the cosine out.
FREE = (
    "resume",
    "out",
    "steps",
    "device",
    "nonfinite",
    "log_every",
    "validate_every",
    "wandb",
    "peak_tflops",
    "stall_seconds",
    "profile",
    "checkpoint",
    "evaluation",
    "data.validation",
    "data.workers",
    "data.max_bad_share",
    "data.train",
)


def require_same_run(folder: Path, recipe: Recipe) -> None:
    """Raises: CheckpointError: if the run in `folder` was started with other settings, naming them."""
    stored = folder / RECIPE_FILE
    if not stored.is_file():
        return
    before, now = (dict(_flat(to_dict(each))) for each in (load_recipe(stored), recipe))
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not f"{key}.".startswith(tuple(f"{free}." for free in FREE))
    ]
    if changed:
        raise CheckpointError(
            f"{folder} was run with another recipe: {'; '.join(changed)}. Resume with its own {stored}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def starting_model(recipe: Recipe) -> tuple[CoCa, ImageConfig]:
    """The model before its first step: random, or from the recipe's weights with positions interpolated to its
    picture size.

    Raises: WeightsError: if the weights are of another size than the recipe says.
    """
    if recipe.initialise_from is None:
        model, processor = random_model(recipe.model_config, seed=recipe.seed)
        return model, processor.image_config
    weights = read_weights(recipe.initialise_from)
    # The mask that the weights were trained with goes on, unless the recipe asks for the other.
    wanted = recipe.model_config
    if "cls_mask" not in recipe.model.get("text", {}):
        wanted = replace(wanted, text=replace(wanted.text, cls_mask=weights.model.text.cls_mask))
    fitted = interpolate_positions(weights.state, patches=wanted.vision.patches)
    try:
        require_same_keys(shapes_of(fitted), shapes_of(meta_state(wanted)))
    except WeightsError as error:
        raise WeightsError(f"{weights.path} is not of size {recipe.size}: {error}") from None
    with torch.device("meta"):
        model = CoCa(wanted)
    model.load_state_dict({name: tensor.float().clone() for name, tensor in fitted.items()}, assign=True)
    return model.requires_grad_(True), replace(weights.image, size=wanted.vision.image_size)


def precision_on(device: torch.device, wanted: Precision) -> Literal["fp32", "bf16"]:
    """The precision of a run on this device: what the recipe wants, or for `auto` bf16 if the device has instructions
    for products of bf16 matrices. A CPU without them takes 20 to 400 times as long: docs/performance.md."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch: fp32
    multiplies = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's
    return "bf16" if multiplies and torch.backends.mkldnn.is_available() else "fp32"


def _device(recipe: Recipe) -> torch.device:
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise TrainingError("device = 'cuda', but torch finds no CUDA device; say device=cpu or auto")
    return torch.device("cuda" if recipe.device == "cuda" or (recipe.device == "auto" and cuda) else "cpu")
