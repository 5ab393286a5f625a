"""Ranks that train as a list of recipes says, a run after the other, and write how each ended: runs.py FOLDER COUNT."""

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from contracap.config import build
from contracap.data.batch import Batch
from contracap.data.loader import TrainingBatches
from contracap.training import loop, step, writer
from contracap.training.recipe import Recipe
from contracap.training.recorder import Recorder
from contracap.training.trainer import train
from tests.distributed.forks import run_ranks


def train_copy(source: str, values: dict) -> None:
    """Go on from step 3 of another run."""
    copy = Path(values["out"])
    shutil.copytree(source, copy, symlinks=True)
    (copy / "checkpoints" / "last").unlink()
    (copy / "checkpoints" / "last").symlink_to("step-00000003")


def asked_to_end(rank: int) -> object:
    """The last rank alone gets a signal, within step 3; all hear of it in the next."""
    train_step = loop.train_step

    def signalling(state, *args):
        if rank and state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(state, *args)

    return patch.object(loop, "train_step", signalling)


@contextmanager
def waited_for(rank: int) -> Iterator[None]:
    """Rank 1 stops to think before its seventh batch, and the fourth step is not finite."""
    batches, loss, calls = TrainingBatches.__iter__, step.contrastive_loss, itertools.count(1)

    def pausing(self: TrainingBatches) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self), start=1):
            if number == 7 and rank == 1:
                time.sleep(8.0)
            yield batch

    def wild(*args: Any, **kwargs: Any) -> Any:
        return loss(*args, **kwargs) * (float("nan") if next(calls) == 4 else 1.0)

    with patch.object(TrainingBatches, "__iter__", pausing), patch.object(step, "contrastive_loss", wild):
        yield


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")


TROUBLES: dict[str, Callable[[int], object]] = {
    "none": lambda rank: patch.object(loop, "train_step", loop.train_step),
    "asked to end": asked_to_end,
    "waited for": waited_for,
    "no room for records": lambda rank: patch.object(Recorder, "record", full),
    "no room for weights": lambda rank: patch.object(writer, "write_weights", full),
    "no room for moments": lambda rank: patch.object(os, "fsync", full if rank else os.fsync),
}


def main(rank: int, folder: Path, runs: list[dict[str, Any]], ports: list[int]) -> None:
    """What one rank does."""
    for run, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if run["source"] and rank == 0:  # the others wait for it at the start of the run
            train_copy(run["source"], run["values"])
        try:
            with TROUBLES[run["trouble"]](rank):
                train(build(Recipe, run["values"]))
            ended = "done"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        (folder / f"{run['name']}.{rank}").write_text(ended)


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    runs = json.loads((folder / "runs.json").read_text())
    run_ranks(count, lambda rank, ports: main(rank, folder, runs, ports), groups=len(runs))
