"""The records of a run: metrics.jsonl, TensorBoard, Weights & Biases, progress bar, skipped samples, traces."""

import gzip
import importlib
import json
import logging
import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from contracap.data.order import SkippedSample
from contracap.files import read_regular, replacing, write_text
from contracap.progress import progress_bar
from contracap.wording import escaped

METRICS_FILE = "metrics.jsonl"
MAX_METRICS = 2**31  # bytes
SKIPPED_FILE = "skipped.jsonl"
SPIKES_FILE = "spikes.jsonl"
CAPTIONS_FILE = "captions.jsonl"
MAX_WARNINGS = 10
logger = logging.getLogger(__name__)


class Recorder:
    """Records numbers by step. A terminal shows a progress bar, other outputs a log line per record."""

    def __init__(self, folder: Path | None, *, start: int, total_steps: int, loggers: Sequence["RunLogger"] = ()):
        """
        Args:
            folder: the run folder; None on ranks that record nothing.
            start: steps done before; records of later steps, from an interrupted run, are dropped.
        """
        self._folder, self._loggers = folder, loggers
        if folder is not None:
            for name in (METRICS_FILE, SKIPPED_FILE, SPIKES_FILE, CAPTIONS_FILE):
                _drop_after(folder / name, start)
        self._warnings = 0
        self._bar = progress_bar(
            total=total_steps, initial=start, unit="step", dynamic_ncols=True, disable=folder is None, log=False
        )
        now = time.monotonic()  # tqdm's own clock may be set back, which makes its rates negative
        vars(self._bar).update(_time=time.monotonic, start_t=now, last_print_t=now)
        self._total = total_steps

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for run_logger in self._loggers:
            run_logger.close(failed=error is not None)

    def progress(self) -> None:
        """Show that a step is done."""
        self._bar.update()

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Record numbers, if there are any. The line is with the operating system when this returns."""
        if not numbers or self._folder is None:
            return
        self._line(METRICS_FILE, {"step": step, **numbers})
        for run_logger in self._loggers:
            run_logger.figures(step, numbers)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar.disable:
            left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
            logger.info("step %d of %d%s: %s", step, self._total, left, text)
        else:
            shown = {"loss": "loss {:.4g}", "samples_per_second": "{:.4g} samples/s"}  # all that fits into a line
            self._bar.set_postfix_str(", ".join(shown[name].format(numbers[name]) for name in shown if name in numbers))

    def skips(self, step: int, skips: Iterable[SkippedSample]) -> None:
        """Record samples that were left out since the last step. Warn of the first ones."""
        for skip in skips if self._folder else ():
            self._line(SKIPPED_FILE, {"step": step, **asdict(skip)})
            self._warnings += 1
            if self._warnings <= MAX_WARNINGS:
                logger.warning("skipped: %s", escaped(skip.reason))
            if self._warnings == MAX_WARNINGS:
                logger.warning("further ones are in %s only", SKIPPED_FILE)

    def spike(self, spike: Mapping[str, Any]) -> None:
        """Record an unusual step, which its field `step` names."""
        self._line(SPIKES_FILE, spike)

    def captions(self, step: int, captions: Sequence[Mapping[str, Any]]) -> None:
        """Record sample captions of this step, if there are any; each has fields `key` and `caption`."""
        if not captions:
            return
        for caption in captions:
            self._line(CAPTIONS_FILE, {"step": step, **caption})
        for run_logger in self._loggers:
            run_logger.captions(step, {caption["key"]: caption["caption"] for caption in captions})

    def _line(self, name: str, values: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, which may still be going on, in order. Numbers that were not finite are None."""
    text = read_regular(folder / METRICS_FILE, MAX_METRICS).decode("utf-8")
    complete, _, _ = text.rpartition("\n")  # the last line may be half written
    return [json.loads(line) for line in complete.splitlines()]


def _finite(value: Any) -> Any:
    """Return the value with None instead of NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in read_regular(path, MAX_METRICS).decode("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_text(path, "".join(kept))


TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


class LoggerError(RuntimeError):
    """A logger that cannot be opened."""


@runtime_checkable
class RunLogger(Protocol):
    """The interface of loggers, which show numbers and texts by step."""

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show numbers as points of curves."""
        ...

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
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

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
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

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
        table = self._table(columns=["key", "caption"], data=[list(row) for row in captions.items()])
        self._run.log({"step": step, "captions": table})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


PROFILE_FOLDER = "profile"
WAIT, WARM_UP, ACTIVE = 10, 2, 3  # steps: not traced, traced but thrown away, and written


class Profile:
    """A trace of one rank's steps 13 to 15, or of the last three of a shorter run, in `profile/rank-N.json.gz`.

    Other steps are not slowed down.
    """

    def __init__(self, folder: Path, *, rank: int, steps: int):
        """
        Args:
            steps: steps that are left to do.
        """
        self._path = folder / PROFILE_FOLDER / f"rank-{rank}.json.gz"
        self._left = 0
        if steps <= WARM_UP:
            logger.warning("profile: with %d steps left there is nothing to trace; it takes %d", steps, WARM_UP + 1)
            return
        wait = max(0, min(WAIT, steps - WARM_UP - ACTIVE))
        self._left = min(wait + WARM_UP + ACTIVE, steps)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities, schedule=schedule(wait=wait, warmup=WARM_UP, active=ACTIVE, repeat=1)
        )
        self._profiler.start()

    def step(self) -> None:
        """Note that a step is done."""
        if not self._left:
            return
        self._left -= 1
        if self._left:
            self._profiler.step()
        else:
            self._profiler.stop()
            self._write()

    def _write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            with (
                replacing(self._path) as partial,
                trace.open("rb") as source,
                gzip.open(partial, "wb") as file,
            ):
                shutil.copyfileobj(source, file)
        logger.info("profile written: %s opens in https://ui.perfetto.dev", self._path)

    def close(self) -> None:
        """Stop tracing. A run that ended too early has no trace."""
        if self._left:
            self._left = 0
            self._profiler.stop()
