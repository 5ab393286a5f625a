"""Checkpoints of a run: what their folder holds, and how a run continues from one."""

import io
import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from contracap.files import read_regular
from contracap.parallel import share_like
from contracap.pretrained import read_weights
from contracap.training.step import TrainingState

CHECKPOINTS = "checkpoints"  # folder in a run's
LAST = "last"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
POSITION_FILE = "position.json"
OPTIMIZER_FOLDER = "optimizer"


class CheckpointError(ValueError):
    """A run folder that cannot be gone on from, or not be written to."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 for none."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be at least 1")
        if self.keep_every < 0 or self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}; it must be a multiple of checkpoint.every {self.every}, "
                "or 0"
            )


def restore_checkpoint(checkpoint: Path, state: TrainingState) -> dict[str, Any]:
    """Fill `state` from a checkpoint whose weights its model already has, and return the position in the data.

    However many ranks wrote it and however they shared the model, each of these takes what it holds. Nothing more is
    needed to repeat what a run without a break does: the learning rate and what is random in a step depend on the seed,
    the step and the rank alone, and what is random in the data on the seed and the position.

    Raises: CheckpointError: if the checkpoint lacks a part, or a part is not what a run writes. WeightsError: if its
        average is broken.
    """
    part = POSITION_FILE
    try:
        position = json.loads(read_regular(checkpoint / POSITION_FILE))
        step, data = int(position["step"]), dict(position["data"])
        part = OPTIMIZER_FOLDER
        optimizer = {"optimizer": optimizer_state(state)}
        expect_one_process()
        dcp.load(
            optimizer,
            storage_reader=_Reader(checkpoint / OPTIMIZER_FOLDER),
            planner=_Planner(),
            no_dist=state.process_group.world_size == 1,
        )
        set_optimizer_state_dict(state.model, state.optimizer, optimizer["optimizer"])
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"{checkpoint} cannot be resumed from: {_trouble(part, error)}") from None
    if state.average is not None:
        if not (checkpoint / AVERAGE_FILE).is_file():
            raise CheckpointError(f"{checkpoint} holds no moving average; set ema_decay = 0")
        average = read_weights(checkpoint / AVERAGE_FILE).state
        for name, tensor in state.average.items():
            tensor.copy_(share_like(average[name], tensor))
    state.step = step
    return data


class _Reader(dcp.FileSystemReader):
    """Reads the optimizer's files, trusting none: torch's own reader runs code that its pickles name."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError: if the metadata are not torch's, or name files elsewhere."""
        super().__init__(folder)
        found = _Unpickler(io.BytesIO(read_regular(folder / ".metadata"))).load()
        if not isinstance(found, metadata.Metadata):
            raise CheckpointError(".metadata holds something else")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path or not (folder / info.relative_path).is_file():
                raise CheckpointError(f".metadata names {info.relative_path!r}, which is not a file next to it")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        self._metadata = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Takes plain values only where torch's own planner unpickles anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of which torch's metadata consist, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePosixPath
        if module == "torch.serialization" and name == "_get_layout":
            return super().find_class(module, name)
        known = {each.__name__: each for each in (torch, metadata, filesystem)}
        found = getattr(known.get(module), name, None)
        if isinstance(found, torch.dtype) or found in _METADATA_CLASSES:
            return found
        raise CheckpointError(f".metadata names {module}.{name}, which no checkpoint has: it may be an attack")


_METADATA_CLASSES = (
    torch.Size,
    filesystem._StorageInfo,
    *(value for value in vars(metadata).values() if isinstance(value, type) and value.__module__ == metadata.__name__),
)


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps after which the whole checkpoints of a run's checkpoint folder were written, in order."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run continues from: the one that `last` points to, or without that link, which some copies
    leave out, the newest. None if there is none yet.

    Raises: CheckpointError: if `last` points to a checkpoint that is gone.
    """
    link = folder / LAST
    names = [checkpoint_name(step) for step in checkpoint_steps(folder)] if folder.is_dir() else []
    if not link.is_symlink():
        return (folder / names[-1]).resolve() if names else None
    if not link.exists():
        remedy = f"point it to {' or '.join(names[-3:])}" if names else "no other is left: choose another out"
        raise CheckpointError(f"{link} points to {os.readlink(link)}, which is gone; {remedy}")
    return link.resolve()


def optimizer_state(state: TrainingState) -> dict[str, Any]:
    """The moments by parameter name; zeros, after no step, of an optimizer that has not stepped."""
    fresh = not state.optimizer.state
    found = get_optimizer_state_dict(state.model, state.optimizer)
    if fresh:  # torch has made the moments by a step with no gradient, and counts it
        for moments in state.optimizer.state.values():
            moments["step"].zero_()
    return found


def moving_average(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters to average into."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _trouble(part: str, error: BaseException) -> str:
    """Why a part of a checkpoint cannot be used: of torch's words only those on what does not match."""
    words = describe(error)
    known = isinstance(error, CheckpointError | OSError) or isinstance(error.__context__, OSError)
    if known or re.search(r"mismatch|Missing key|CheckpointError", words):
        return words
    return f"{part} is damaged, or not what a run writes: choose an older checkpoint"


def describe(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks, on the first that had trouble."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return describe(next(iter(error.failures.values()))[0])
    if isinstance(error.__context__, OSError):  # torch puts a RuntimeError about positions in a file on top
        return describe(error.__context__)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def expect_one_process() -> None:
    """Never warn that there is no process group, which in one process is as it should be.

    For good, and not around a call: warnings belong to the process, and checkpoints are written by a thread.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
