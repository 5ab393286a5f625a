"""Checkpoints of a run: written whole or not at all, the newest one under the name `last`."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from contracap.image import ImageConfig
from contracap.pretrained import read_weights, save
from contracap.training.step import TrainingState

LAST = "last"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
POSITION_FILE = "position.json"
OPTIMIZER_FOLDER = "optimizer"


class CheckpointError(ValueError):
    """A run folder that cannot be gone on from."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written.

    Attributes:
        every: steps between checkpoints; one is always written at the end.
        keep: newest checkpoints that stay.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be at least 1")


def save_checkpoint(folder: Path, state: TrainingState, *, image: ImageConfig, data: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-NNNNNNNN` and point `folder/last` at it; a kill at any moment leaves the one before.

    Args:
        data: position in the data, plain JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.partial"):
        _remove(left_over)
    final = folder / checkpoint_name(state.step)
    partial = folder / f".{final.name}.partial"
    partial.mkdir()
    save(partial / WEIGHTS_FILE, model=state.model.config, image=image, state=state.model.state_dict())
    if state.average is not None:
        save(partial / AVERAGE_FILE, model=state.model.config, image=image, state=state.average)
    optimizer = {"optimizer": get_optimizer_state_dict(state.model, state.optimizer)}
    with _one_process():
        dcp.save(optimizer, checkpoint_id=partial / OPTIMIZER_FOLDER, no_dist=True)
    (partial / POSITION_FILE).write_text(json.dumps({"step": state.step, "data": data}))
    for path in [*partial.rglob("*"), partial]:
        _to_disk(path)
    if final.exists():
        _remove(final)
    os.replace(partial, final)
    link = folder / f".{LAST}.partial"
    link.symlink_to(final.name)
    os.replace(link, folder / LAST)
    _to_disk(folder)
    older = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and path.name < final.name)
    for old in older[: max(0, len(older) - (keep - 1))]:
        _remove(old)
    return final


def restore_checkpoint(checkpoint: Path, state: TrainingState) -> dict[str, Any]:
    """Fill `state` from a checkpoint of the same model and return the position in the data.

    Raises: CheckpointError: if the checkpoint is of another model or lacks a part. WeightsError: if its weights are
        broken.
    """
    weights = read_weights(checkpoint / WEIGHTS_FILE)
    if weights.model != state.model.config:
        raise CheckpointError(f"{checkpoint} holds a model of another size than the recipe's; choose another `out`")
    try:
        position = json.loads((checkpoint / POSITION_FILE).read_text())
        optimizer = {"optimizer": get_optimizer_state_dict(state.model, state.optimizer)}
        with _one_process():
            dcp.load(optimizer, checkpoint_id=checkpoint / OPTIMIZER_FOLDER, no_dist=True)
    except (OSError, json.JSONDecodeError, dcp.api.CheckpointException, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(f"{checkpoint} cannot be resumed from: {reason}") from None
    set_optimizer_state_dict(state.model, state.optimizer, optimizer["optimizer"])
    state.model.load_state_dict(weights.state)
    if state.average is not None:
        if not (checkpoint / AVERAGE_FILE).is_file():
            raise CheckpointError(f"{checkpoint} holds no moving average; set ema_decay = 0")
        average = read_weights(checkpoint / AVERAGE_FILE).state
        for name, tensor in state.average.items():
            tensor.copy_(average[name])
    state.step = position["step"]
    return position["data"]


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's checkpoint folder; None if there is none yet.

    Raises: CheckpointError: if `last` points to a checkpoint that is gone.
    """
    link = folder / LAST
    if link.is_symlink() and not link.exists():
        raise CheckpointError(
            f"{link} points to {os.readlink(link)}, which is gone; point it to another one, or remove it"
        )
    return link.resolve() if link.exists() else None


def moving_average(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters to average into."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning that there is no process group, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _remove(path: Path) -> None:
    """Delete a file or folder that never stands half deleted under its own name."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name.strip('.')}.removed.partial")
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink()


def _to_disk(path: Path) -> None:
    """Make sure that what was written survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
