"""Loggers, which show a run's numbers and captions: TensorBoard, Weights & Biases."""

import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from contracap.files import write_text

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


class LoggerError(RuntimeError):
    """A logger that cannot be opened."""


@runtime_checkable
class RunLogger(Protocol):
    """The interface of loggers, which show numbers and texts by step."""

    def log_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show numbers as points of curves."""
        ...

    def log_captions(self, step: int, captions: Mapping[str, str]) -> None:
        """Show captions by the keys of their images."""
        ...

    def close(self, *, failed: bool) -> None:
        """Close the logger after the run has ended."""
        ...


def open_loggers(folder: Path, *, start: int, wandb: str | None, settings: Mapping[str, Any]) -> Sequence[RunLogger]:
    """Open the loggers of the run in `folder`.

    Args:
        start: steps done before; TensorBoard hides what an interrupted run showed after them.
        wandb: project at Weights & Biases.
        settings: the run's settings, shown at Weights & Biases.

    Raises: ImportError, LoggerError: if `wandb` is given and its package is missing, or cannot start.
    """
    others = [WeightsAndBiasesLogger(folder, project=wandb, settings=settings)] if wandb is not None else []
    return [TensorBoardLogger(folder, start=start), *others]


def require_wandb(project: str | None) -> None:
    """Raises: ImportError: if a project is given and the package of Weights & Biases is missing."""
    if project is None:
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise ImportError(
            f"wandb = {project!r} needs the package of Weights & Biases: pip install 'contracap[wandb]', or leave "
            "the key out"
        ) from None


class TensorBoardLogger:
    """Event files in the run folder."""

    def __init__(self, folder: Path, *, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start + 1 if start else 0)

    def log_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def log_captions(self, step: int, captions: Mapping[str, str]) -> None:
        self._writer.add_text("captions", "\n\n".join(f"{key}: {text}" for key, text in captions.items()), step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiasesLogger:
    """A run at Weights & Biases. A resumed run continues there too, by the id in the run folder.

    The environment variables of wandb hold: WANDB_MODE=offline sends nothing, WANDB_ENTITY names the owner. Steps that
    a resumed run repeats appear twice, with equal numbers.
    """

    def __init__(self, folder: Path, *, project: str, settings: Mapping[str, Any]):
        """Raises: ImportError: if the package is missing. LoggerError: if it cannot start."""
        require_wandb(project)
        wandb = importlib.import_module("wandb")
        known = folder / WANDB_ID_FILE
        id = known.read_text().strip() if known.is_file() else secrets.token_hex(4)
        self._table = wandb.Table
        try:
            self._run = wandb.init(
                project=project,
                dir=str(folder),
                name=folder.name,
                id=id,
                resume="allow",
                config=dict(settings),
            )
        except Exception as error:  # wandb has many kinds, for servers, accounts and settings
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise LoggerError(
                f"wandb = {project!r} cannot be started: {reason}. "
                "Log in with `wandb login`, set WANDB_MODE=offline, or leave the key out"
            ) from error
        write_text(known, id + "\n")
        # wandb's own step only grows; after a resume, ours goes back to the checkpoint's.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def log_captions(self, step: int, captions: Mapping[str, str]) -> None:
        table = self._table(columns=["key", "caption"], data=[list(row) for row in captions.items()])
        self._run.log({"step": step, "captions": table})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
