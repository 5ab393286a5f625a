"""Where a run's curves and sample captions can be watched: TensorBoard, and Weights & Biases if the recipe names a
project there."""

import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from contracap.files import write_text

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


class BoardError(RuntimeError):
    """A board that cannot be opened; the message says what would do."""


@runtime_checkable
class Board(Protocol):
    """Something that shows numbers and texts by step."""

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves."""
        ...

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
        """What the model wrote for the pictures of these keys."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        ...


def open_boards(folder: Path, *, start: int, wandb: str | None, settings: Mapping[str, Any]) -> Sequence[Board]:
    """The boards of the run in `folder`.

    Args:
        start: steps done before; what was shown beyond it, of a run that was cut off, is hidden where a board can.
        wandb: project of Weights & Biases.
        settings: of the run, for those who compare runs.

    Raises: ImportError, BoardError: if `wandb` is named and its package is missing, or cannot begin.
    """
    others = [WeightsAndBiases(folder, project=wandb, settings=settings)] if wandb is not None else []
    return [TensorBoard(folder, start=start), *others]


def require_wandb(project: str | None) -> None:
    """To be asked on every rank before a run begins, though one of them shows it.

    Raises: ImportError: if a project is named and the package of Weights & Biases is missing.
    """
    if project is None:
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise ImportError(
            f"wandb = {project!r} needs the package of Weights & Biases: pip install 'contracap[wandb]', or leave "
            "the key out"
        ) from None


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, *, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start + 1 if start else None)

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
        self._writer.add_text("captions", "\n\n".join(f"{key}: {text}" for key, text in captions.items()), step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; the same one after a resume, by the id in the run folder.

    Their own environment variables hold: WANDB_MODE=offline sends nothing, WANDB_ENTITY names the owner. Steps that a
    resume repeats are there twice, with equal numbers.
    """

    def __init__(self, folder: Path, *, project: str, settings: Mapping[str, Any]):
        """Raises: ImportError: if the package is missing. BoardError: if it cannot begin."""
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
        except Exception as error:  # of its own kinds, by what its server, its account or its settings lack
            raise BoardError(
                f"wandb = {project!r} cannot be begun: {' '.join(str(error).split()) or type(error).__name__}. "
                "Log in with `wandb login`, set WANDB_MODE=offline, or leave the key out"
            ) from error
        write_text(known, id + "\n")
        # Their own count only grows; after a resume ours may go back to the checkpoint's step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
        table = self._table(columns=["key", "caption"], data=[list(row) for row in captions.items()])
        self._run.log({"step": step, "captions": table})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
