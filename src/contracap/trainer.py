"""The trainer: a recipe in, a run folder out."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from contracap.config import to_dict, to_toml
from contracap.data.loader import TrainingBatches, joined_states
from contracap.data.order import OrderError
from contracap.data.shards import list_shards
from contracap.files import write_text
from contracap.image import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.weights import WeightsError, interpolate_positions, meta_state, require_same_keys, shapes_of
from contracap.parallel import ParallelError, Ranks, started, wrapped
from contracap.pretrained import load, processor_for, random_model, read_weights
from contracap.recipe import Precision, Recipe, load_recipe
from contracap.training.checkpoint import (
    CheckpointError,
    checkpoint_name,
    describe,
    last_checkpoint,
    moving_average,
    restore_checkpoint,
)
from contracap.training.interruption import Interrupted, Requests, requests_to_end
from contracap.training.loop import Event, TrainingError, repeat_steps
from contracap.training.metrics import METRICS_FILE, Recorder, Silent
from contracap.training.optimizer import build_optimizer, freeze
from contracap.training.step import StepConfig, TrainingState
from contracap.training.validation import validate
from contracap.training.writer import CheckpointWriter

RECIPE_FILE = "recipe.toml"
CHECKPOINTS = "checkpoints"
logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> Path:
    """Train to the recipe's last step and return the newest checkpoint. Under `torchrun` the ranks share each batch.

    Writes to the run folder: `recipe.toml` (resolved), `metrics.jsonl`, `skipped.jsonl`, `tensorboard/`, `checkpoints/`
    with `last`.

    Raises:
        CheckpointError: if the folder holds a run and `resume` is false, or one of another model; if it can no longer
            be written to.
        TrainingError: at a NaN or infinite loss, unless the recipe skips such steps.
        OrderError: if too much of the data is bad.
        ParallelError: if the ranks cannot be started, or cannot share the batch.
        Interrupted: after a checkpoint, if any of the ranks got SIGTERM or SIGUSR1.
    """
    with requests_to_end() as requests, started(_device(recipe)) as ranks:
        return _train(recipe, ranks, requests)


def _train(recipe: Recipe, ranks: Ranks, requests: Requests) -> Path:
    folder = Path(recipe.out)
    checkpoints = folder / CHECKPOINTS
    checkpoint = ranks.broadcast(last_checkpoint(checkpoints))
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
    if recipe.data.validation is not None:
        list_shards(recipe.data.validation)  # a wrong path is found now, not hours later
    if checkpoint:
        require_same_run(folder, recipe)
        model, processor = load(checkpoint)
        image = processor.image_config
    else:
        model, image = starting_model(recipe)
    freeze(model, recipe.frozen)
    freeze(model, [] if recipe.loss.contrastive else model.only_for_contrastive())
    freeze(model, [] if recipe.loss.captioning else model.only_for_captioning())
    model.use(recipe.kernels)
    model.to(ranks.device)
    shared = wrapped(model, recipe.parallel, ranks, bf16=recipe.precision == "bf16")
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer),
        average=moving_average(model) if recipe.ema_decay else None,
        ranks=ranks,
        wrapped=shared,
    )
    tokenizer = processor_for(model.config, image).tokenizer
    batches = TrainingBatches(
        recipe.data, image=image, tokenizer=tokenizer, seed=recipe.seed, rank=ranks.rank, ranks=ranks.count
    )
    if checkpoint:
        batches.load_state_dict(restore_checkpoint(checkpoint, state))
        if state.step > recipe.steps:
            raise CheckpointError(
                f"{checkpoint} is already at step {state.step}, beyond the recipe's {recipe.steps} steps"
            )
        logger.info("going on from %s", checkpoint)
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
    ranks.wait()  # all have looked at what the folder held before it changes
    try:
        if ranks.rank == 0:
            write_text(folder / RECIPE_FILE, to_toml(recipe))
        with (
            CheckpointWriter(checkpoints, recipe.checkpoint, image=image, ranks=ranks) as writer,
            Recorder(folder, start=state.step, total_steps=recipe.steps) if ranks.rank == 0 else Silent() as recorder,
        ):
            _run(recipe, state, batches, config, writer=writer, recorder=recorder, requests=requests)
    except OSError as error:
        raise _stopped(folder, describe(error)) from None
    return checkpoints / checkpoint_name(recipe.steps)


def _run(
    recipe: Recipe,
    state: TrainingState,
    batches: TrainingBatches,
    config: StepConfig,
    *,
    writer: CheckpointWriter,
    recorder: Recorder,
    requests: Requests,
) -> None:
    """The steps, and what happens between them."""
    folder, ranks = Path(recipe.out), state.ranks
    trouble: list[OSError] = []  # that rank 0 has with its records; the others hear of it when they agree

    @contextmanager
    def recording() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            trouble.append(error)

    def skipping() -> None:
        skips = [skip for skips in ranks.collect(batches.take_skips()) for skip in skips]
        with recording():
            recorder.skips(skips)

    def log() -> None:
        total = sum(map(Counter, ranks.collect(batches.skipped)), Counter[str]())
        with recording():
            if ranks.rank == 0:
                os.stat(folder / METRICS_FILE)  # lines go on into a file that was deleted, and nobody would notice
            recorder.log({f"skipped/{kind}": float(number) for kind, number in total.items()})

    def validation() -> None:
        numbers = validate(state, recipe.data, config)
        with recording():
            recorder.record(state.step, numbers)

    def checkpointing() -> None:
        skipping()
        writer.save(state, joined_states(ranks.collect(batches.state_dict())))

    def agreeing() -> None:
        asked, failed = ranks.any(requests.received, writer.failed or bool(trouble))
        if failed:
            writer.wait()
            raise _stopped(folder, ranks.broadcast(describe(trouble[0]) if trouble else ""))
        if asked and state.step < recipe.steps:
            checkpointing()
            writer.wait()
            raise Interrupted(
                f"interrupted after step {state.step} of {recipe.steps}: resume=true goes on from "
                f"{last_checkpoint(folder / CHECKPOINTS)}"
            )

    events = [
        Event(1 if ranks.count == 1 else recipe.log_every, skipping),  # with several it takes a message to all
        Event(recipe.log_every, log),
        Event(recipe.checkpoint.every, checkpointing),
        Event(1, agreeing),
    ]
    if recipe.validate_every:
        events.insert(3, Event(recipe.validate_every, validation))
    try:
        repeat_steps(state, batches, config, recorder=recorder, events=events, nonfinite=recipe.nonfinite)
    except TrainingError as error:
        writer.wait()
        raise TrainingError(
            f"{error}. Last good checkpoint: {last_checkpoint(folder / CHECKPOINTS) or 'none yet'}. "
            "Lower optimizer.peak_rate, or say nonfinite=skip to leave such steps out"
        ) from None
    except OrderError:  # on this rank alone: the others are not asked
        recorder.skips(batches.take_skips())
        recorder.record(state.step, {f"skipped/{kind}": float(count) for kind, count in batches.skipped.items()})
        raise


def _stopped(folder: Path, reason: str) -> CheckpointError:
    last = last_checkpoint(folder / CHECKPOINTS) or "none yet"
    return CheckpointError(
        f"{folder}: the run cannot go on: {reason}. Last good checkpoint: {last}. "
        "Put that right, then go on with resume=true"
    )


# What a resumed run may change: none of it changes the updates by more than rounding, but for `steps`, which draws the
# cosine out.
FREE = (
    "resume",
    "out",
    "steps",
    "device",
    "kernels",
    "nonfinite",
    "log_every",
    "validate_every",
    "checkpoint",
    "parallel",
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
