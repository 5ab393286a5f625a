"""Checkpoints of a run: the contents of their folder, and how a run resumes from one."""

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
from contracap.parallel import shard_like
from contracap.pretrained import read_weights
from contracap.training.step import TrainingState

CHECKPOINTS = "checkpoints"  # in the run folder
LAST = "last"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
POSITION_FILE = "position.json"
OPTIMIZER_FOLDER = "optimizer"


class CheckpointError(ValueError):
    """A run folder from which a run cannot be resumed, or to which it cannot be written."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Schedule of the checkpoints, and which of them are kept."""

    every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never deleted; 0 for none."""

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

    The number of ranks and the kind of sharding may differ from those that wrote it. Nothing else is needed to repeat
    an uninterrupted run: the learning rate and the randomness of a step depend only on the seed, the step and the rank;
    the randomness of the data depends only on the seed and the position.

    Raises:
        CheckpointError: if the checkpoint lacks a part, or a part is not what a run writes.
        WeightsError: if its moving average is broken.
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
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{checkpoint} cannot be resumed from: {_trouble(part, error)}") from None
    if state.average is not None:
        if not (checkpoint / AVERAGE_FILE).is_file():
            raise CheckpointError(f"{checkpoint} holds no moving average; set ema_decay = 0")
        average = read_weights(checkpoint / AVERAGE_FILE).state
        for name, tensor in state.average.items():
            tensor.copy_(shard_like(average[name], tensor))
    state.step = step
    return data


class _Reader(dcp.FileSystemReader):
    """Reads the optimizer's files without trusting them; torch's own reader runs code that their pickles name."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError: if the metadata is not torch's, or names files outside the folder."""
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
    """Loads plain values only; torch's own planner unpickles anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


class _Unpickler(pickle.Unpickler):
    """Knows the classes that torch's metadata consists of, and no others."""

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
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a checkpoint folder, in order."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that a run resumes from; None if there is none yet.

    It is the one that `last` points to. Without that link, which some tools do not copy, it is the newest.

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
    """Return the optimizer's moments by parameter name; before the first step they are zeros."""
    fresh = not state.optimizer.state
    found = get_optimizer_state_dict(state.model, state.optimizer)
    if fresh:  # torch created the moments by a step without gradients, and counted it
        for moments in state.optimizer.state.values():
            moments["step"].zero_()
    return found


def moving_average(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the parameters, as the start of their moving average."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _trouble(part: str, error: BaseException) -> str:
    """Describe why a part of a checkpoint cannot be used; of torch's messages, show only those about mismatches."""
    words = describe_error(error)
    known = isinstance(error, CheckpointError | OSError) or isinstance(error.__context__, OSError)
    if known or re.search(r"mismatch|Missing key|CheckpointError", words):
        return words
    return f"{part} is damaged, or not what a run writes: choose an older checkpoint"


def describe_error(error: BaseException) -> str:
    """Describe an error in one line; if several ranks have one, that of the first."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return describe_error(next(iter(error.failures.values()))[0])
    if isinstance(error.__context__, OSError):  # torch hides it in a RuntimeError about positions in a file
        return describe_error(error.__context__)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def expect_one_process() -> None:
    """Silence torch's warning that there is no process group: a single process needs none.

    The filter stays, because warning filters belong to the process, and a thread writes the checkpoints.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
