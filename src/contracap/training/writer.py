"""Writing checkpoints atomically while the run continues, the newest one under the name `last`."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from contracap.images import ImageConfig
from contracap.model.coca import CoCaConfig
from contracap.parallel import TIMEOUT, ProcessGroup, full_tensor
from contracap.pretrained import write_weights
from contracap.training.checkpoint import (
    AVERAGE_FILE,
    LAST,
    OPTIMIZER_FOLDER,
    POSITION_FILE,
    WEIGHTS_FILE,
    CheckpointConfig,
    CheckpointError,
    checkpoint_name,
    checkpoint_steps,
    describe_error,
    expect_one_process,
    last_checkpoint,
    optimizer_state,
)
from contracap.training.step import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint, copied so that the next steps do not change them.

    Attributes:
        weights, average: full tensors, on rank 0 alone; `average` is None if the run keeps none.
        optimizer: this rank's shard.
        data: position in the data, plain JSON values.
    """

    step: int
    model: CoCaConfig
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, state: TrainingState, data: dict[str, Any]) -> "Snapshot":
        """Copy a state between two steps. Every rank must call it, because sharded parameters are gathered."""

        def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            gathered = ((name, full_tensor(tensor.detach())) for name, tensor in tensors.items())
            return {name: _copy(tensor) for name, tensor in gathered if state.process_group.rank == 0}

        return cls(
            step=state.step,
            model=state.model.config,
            weights=gather(state.model.state_dict()),
            average=None if state.average is None else gather(state.average),
            optimizer=_copy(optimizer_state(state)),
            data=data,
        )


class CheckpointWriter:
    """Writes `folder/step-NNNNNNNN` and points `folder/last` to it. A kill at any moment leaves the last one intact.

    A thread of each rank writes, one checkpoint at a time. The threads have a process group of their own, through which
    every rank hears of an error; the next call raises it. The end of the context waits for the checkpoint under way.

    With more than one rank, all see the same folder and make the same calls in the same order.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, image: ImageConfig, process_group: ProcessGroup):
        """
        Args:
            image: how images are prepared for the model; stored with its weights.
        """
        self._folder, self._config, self._image, self._process_group = folder, config, image, process_group
        self._group: dist.ProcessGroup | None = None
        if process_group.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=self._set_device)
        self._written: Future[None] | None = None
        self._step: int | None = None
        expect_one_process()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # After an error, other ranks may be lost: do not wait for them, but report it at once. On CPUs wait anyway,
        # because the thread still needs the group, which ends here. A partial checkpoint has no final name yet.
        self._thread.shutdown(wait=kind is None or self._group is None or self._process_group.device.type == "cpu")
        if kind is None:
            self.wait()

    def _set_device(self) -> None:
        """Set the rank's device: a new thread starts on device 0."""
        if self._process_group.device.index is not None and self._process_group.device.type == "cuda":
            torch.cuda.set_device(self._process_group.device)

    def save(self, state: TrainingState, data: dict[str, Any]) -> None:
        """Wait for the previous checkpoint, copy the state, and begin to write it.

        Do nothing if the previous checkpoint is of the same step.

        Args:
            data: position in the data, plain JSON values.

        Raises: CheckpointError: if the previous one could not be written.
        """
        self.wait()
        if self._step != state.step:
            self._step = state.step
            self._written = self._thread.submit(self._write, Snapshot.of(state, data))

    @property
    def failed(self) -> bool:
        """True if this rank already knows that the last checkpoint cannot be written."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises: CheckpointError: if it cannot be written; names the reason and the last good one.
        """
        if self._written is not None:
            self._written.result()

    def _write(self, snapshot: Snapshot) -> None:
        final = self._folder / checkpoint_name(snapshot.step)
        partial = self._folder / f".{final.name}.partial"
        try:
            self._on_rank_0(lambda: self._make_room(partial))
            dcp.save(
                {"optimizer": snapshot.optimizer},
                checkpoint_id=partial / OPTIMIZER_FOLDER,
                process_group=self._group,
                no_dist=self._group is None,
            )
            self._on_rank_0(lambda: self._finish(snapshot, partial, final))
        except (Exception, dcp.api.CheckpointException) as error:  # torch's is not an Exception
            if self._process_group.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final} cannot be written: {describe_error(error)}. "
                f"Last good checkpoint: {last_checkpoint(self._folder) or 'none yet'}. "
                "Put that right, then continue with resume=true"
            ) from error

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; if it fails, raise its error on every rank."""
        problem: Exception | None = None
        if self._process_group.rank == 0:
            try:
                action()
            except Exception as error:
                problem = error
        reasons = [problem and describe_error(problem)]
        if self._group is not None:
            dist.broadcast_object_list(reasons, group=self._group)
        if reasons[0] is not None:
            raise CheckpointError(reasons[0]) from problem

    def _make_room(self, partial: Path) -> None:
        self._folder.mkdir(exist_ok=True)  # without parents: the run folder may have been deleted
        for left_over in self._folder.glob(".*.partial"):
            _remove(left_over)
        partial.mkdir()

    def _finish(self, snapshot: Snapshot, partial: Path, final: Path) -> None:
        for file, tensors in ((WEIGHTS_FILE, snapshot.weights), (AVERAGE_FILE, snapshot.average)):
            if tensors is not None:
                write_weights(partial / file, model=snapshot.model, image=self._image, state=tensors)
        (partial / POSITION_FILE).write_text(json.dumps({"step": snapshot.step, "data": snapshot.data}))
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        link, last = self._folder / f".{LAST}.partial", self._folder / LAST
        link.symlink_to(final.name)
        if last.is_dir() and not last.is_symlink():  # a copy of the run that followed links
            _remove(last)
        os.replace(link, last)
        _sync(self._folder)
        steps = [step for step in checkpoint_steps(self._folder) if step <= snapshot.step]
        for step in steps[: -self._config.keep]:
            if not self._config.keep_every or step % self._config.keep_every:
                _remove(self._folder / checkpoint_name(step))


def _copy(value: Any) -> Any:
    """Return the value with its tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copy(each) for name, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def _remove(path: Path) -> None:
    """Delete a file or folder. It is renamed first, so that it is never half deleted under its own name.

    A failure, such as a file that another machine has open on NFS, does not end the run: the next checkpoint tries
    again.
    """
    removed = ".removed.partial"
    try:
        if path.is_dir() and not path.is_symlink():
            hidden = path if path.name.endswith(removed) else path.with_name(f".{path.name.strip('.')}{removed}")
            os.replace(path, hidden)
            shutil.rmtree(hidden)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, describe_error(error))


def _sync(path: Path) -> None:
    """Make sure that a written file or folder survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
