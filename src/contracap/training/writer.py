"""Checkpoints written while the run continues, whole or not at all, the newest one under the name `last`."""

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
from contracap.parallel import TIMEOUT, ProcessGroup, whole
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
    describe,
    expect_one_process,
    last_checkpoint,
    optimizer_state,
)
from contracap.training.step import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory of its own: steps that follow do not change it.

    Attributes:
        weights, average: on rank 0 alone, whole; no average where the run keeps none.
        optimizer: as each rank holds it.
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
        """Take one between two steps; on every rank, for parameters that are shared out are brought together."""

        def brought(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            together = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
            return {name: _copied(tensor) for name, tensor in together if state.process_group.rank == 0}

        return cls(
            step=state.step,
            model=state.model.config,
            weights=brought(state.model.state_dict()),
            average=None if state.average is None else brought(state.average),
            optimizer=_copied(optimizer_state(state)),
            data=data,
        )


class CheckpointWriter:
    """Writes `folder/step-NNNNNNNN` and points `folder/last` at it; a kill at any moment leaves the one before.

    A thread of each rank writes, one checkpoint at a time. What goes wrong there is raised by whatever asks next: on
    every rank, for they hear of each other's trouble in a process group of their own. The end of the context waits for
    what is being written.

    With more than one rank, all see the same folder, and make the same calls in the same order.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, image: ImageConfig, process_group: ProcessGroup):
        """`image`: how the model's images are prepared, which goes with its weights."""
        self._folder, self._config, self._image, self._process_group = folder, config, image, process_group
        self._group: dist.ProcessGroup | None = None
        if process_group.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=self._take_device)
        self._written: Future[None] | None = None
        self._step: int | None = None
        expect_one_process()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Where other ranks may be lost, what went wrong is said at once. On CPUs the group ends here as well, which the
        # thread still needs. What is not whole yet has no final name.
        self._thread.shutdown(wait=kind is None or self._group is None or self._process_group.device.type == "cpu")
        if kind is None:
            self.wait()

    def _take_device(self) -> None:
        """A thread starts on device 0, whichever its rank has."""
        if self._process_group.device.index is not None and self._process_group.device.type == "cuda":
            torch.cuda.set_device(self._process_group.device)

    def save(self, state: TrainingState, data: dict[str, Any]) -> None:
        """Copy what a checkpoint holds and begin to write it, when the one before is written. Nothing to do if that was
        of the same step.

        Args:
            data: position in the data, plain JSON values.

        Raises: CheckpointError: if the one before could not be written.
        """
        self.wait()
        if self._step != state.step:
            self._step = state.step
            self._written = self._thread.submit(self._write, Snapshot.of(state, data))

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the last checkpoint cannot be written."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Go on when the last checkpoint is written.

        Raises: CheckpointError: if it cannot be: what was wrong, and which is the last good one.
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
        except (Exception, dcp.api.CheckpointException) as error:  # torch's is none of the former
            if self._process_group.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final} cannot be written: {describe(error)}. "
                f"Last good checkpoint: {last_checkpoint(self._folder) or 'none yet'}. "
                "Put that right, then continue with resume=true"
            ) from error

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Every rank raises what goes wrong there."""
        problem: Exception | None = None
        if self._process_group.rank == 0:
            try:
                action()
            except Exception as error:
                problem = error
        reasons = [problem and describe(problem)]
        if self._group is not None:
            dist.broadcast_object_list(reasons, group=self._group)
        if reasons[0] is not None:
            raise CheckpointError(reasons[0]) from problem

    def _make_room(self, partial: Path) -> None:
        self._folder.mkdir(exist_ok=True)  # but not the run's, if that has gone
        for left_over in self._folder.glob(".*.partial"):
            _remove(left_over)
        partial.mkdir()

    def _finish(self, snapshot: Snapshot, partial: Path, final: Path) -> None:
        for file, tensors in ((WEIGHTS_FILE, snapshot.weights), (AVERAGE_FILE, snapshot.average)):
            if tensors is not None:
                write_weights(partial / file, model=snapshot.model, image=self._image, state=tensors)
        (partial / POSITION_FILE).write_text(json.dumps({"step": snapshot.step, "data": snapshot.data}))
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        link, last = self._folder / f".{LAST}.partial", self._folder / LAST
        link.symlink_to(final.name)
        if last.is_dir() and not last.is_symlink():  # a copy of the run that followed links
            _remove(last)
        os.replace(link, last)
        _to_disk(self._folder)
        steps = [step for step in checkpoint_steps(self._folder) if step <= snapshot.step]
        for step in steps[: -self._config.keep]:
            if not self._config.keep_every or step % self._config.keep_every:
                _remove(self._folder / checkpoint_name(step))


def _copied(value: Any) -> Any:
    """The value with its tensors in memory of their own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _remove(path: Path) -> None:
    """Delete a file or folder that never stands half deleted under its own name.

    What cannot be deleted, such as a file that another machine has open on NFS, does not end a run: the next
    checkpoint tries again.
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
        logger.warning("%s cannot be deleted: %s", path, describe(error))


def _to_disk(path: Path) -> None:
    """Make sure that what was written survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
