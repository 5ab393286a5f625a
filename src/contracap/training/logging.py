"""What a run writes, on rank 0: a line per record in metrics.jsonl, curves in TensorBoard and at Weights & Biases, a
progress bar, a line for each skipped sample, spike and sample caption. On request each rank writes a trace."""

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

from contracap.data.order import Skip
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
    """Records numbers by step. On a terminal a progress bar, elsewhere a log line per record."""

    def __init__(self, folder: Path | None, *, start: int, total_steps: int, loggers: Sequence["RunLogger"] = ()):
        """
        Args:
            folder: of the run; None on ranks that record nothing.
            start: steps done before; records after it, of a run that was cut off, are dropped.
        """
        self._folder, self._loggers = folder, loggers
        if folder is not None:
            for name in (METRICS_FILE, SKIPPED_FILE, SPIKES_FILE, CAPTIONS_FILE):
                _forget_after(folder / name, start)
        self._warnings = 0
        self._bar = progress_bar(
            total=total_steps, initial=start, unit="step", dynamic_ncols=True, disable=folder is None, log=False
        )
        now = time.monotonic()  # tqdm's own clock may be set back, and its rates become negative
        vars(self._bar).update(_time=time.monotonic, start_t=now, last_print_t=now)
        self._total = total_steps

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for run_logger in self._loggers:
            run_logger.close(failed=error is not None)

    def progress(self) -> None:
        """A step is done."""
        self._bar.update()

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Write numbers down, if there are any; the system has the line when this returns."""
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
            shown = {"loss": "loss {:.4g}", "samples_per_second": "{:.4g} samples/s"}  # what a line has room for
            self._bar.set_postfix_str(", ".join(shown[name].format(numbers[name]) for name in shown if name in numbers))

    def skips(self, step: int, skips: Iterable[Skip]) -> None:
        """Write down samples that the data left out since the last step. The first ones are warned of, too."""
        for skip in skips if self._folder else ():
            self._line(SKIPPED_FILE, {"step": step, **asdict(skip)})
            self._warnings += 1
            if self._warnings <= MAX_WARNINGS:
                logger.warning("skipped: %s", escaped(skip.reason))
            if self._warnings == MAX_WARNINGS:
                logger.warning("further ones are in %s only", SKIPPED_FILE)

    def spike(self, spike: Mapping[str, Any]) -> None:
        """Write down a step whose numbers were not as usual; its field `step` says which."""
        self._line(SPIKES_FILE, spike)

    def captions(self, step: int, captions: Sequence[Mapping[str, Any]]) -> None:
        """Write down what the model writes at this step, if anything; each has fields `key` and `caption`."""
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
    """The records of a run, which may be going on, in order; a number that was NaN or infinite is None."""
    text = read_regular(folder / METRICS_FILE, MAX_METRICS).decode("utf-8")
    whole, _, _ = text.rpartition("\n")  # a line may be half written
    return [json.loads(line) for line in whole.splitlines()]


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that a kill cut short."""
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
    """A logger that cannot be opened. The message says what to do."""


@runtime_checkable
class RunLogger(Protocol):
    """Something that shows numbers and texts by step."""

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves."""
        ...

    def captions(self, step: int, captions: Mapping[str, str]) -> None:
        """What the model wrote for the images of these keys."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        ...


def open_loggers(folder: Path, *, start: int, wandb: str | None, settings: Mapping[str, Any]) -> Sequence[RunLogger]:
    """The loggers of the run in `folder`.

    Args:
        start: steps done before; a logger hides, where it can, what an interrupted run showed after them.
        wandb: project of Weights & Biases.
        settings: of the run, for those who compare runs.

    Raises: ImportError, LoggerError: if `wandb` is named and its package is missing, or cannot begin.
    """
    others = [WeightsAndBiasesLogger(folder, project=wandb, settings=settings)] if wandb is not None else []
    return [TensorBoardLogger(folder, start=start), *others]


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


class TensorBoardLogger:
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


class WeightsAndBiasesLogger:
    """A run at Weights & Biases; the same one after a resume, by the id in the run folder.

    Their own environment variables hold: WANDB_MODE=offline sends nothing, WANDB_ENTITY names the owner. Steps that a
    resume repeats are there twice, with equal numbers.
    """

    def __init__(self, folder: Path, *, project: str, settings: Mapping[str, Any]):
        """Raises: ImportError: if the package is missing. LoggerError: if it cannot begin."""
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
            raise LoggerError(
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


PROFILE_FOLDER = "profile"
WAIT, WARM_UP, ACTIVE = 10, 2, 3  # steps: left alone, traced but thrown away, and written
logger = logging.getLogger(__name__)


class Profile:
    """Traces one rank's steps 13 to 15 after the start, or the last three of a shorter run, into
    `profile/rank-N.json.gz`. Steps before and after are not slowed down."""

    def __init__(self, folder: Path, *, rank: int, steps: int):
        """`steps`: that the run has still to do."""
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
        """A step is done."""
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
        """The run has ended; one that ended too early has no trace."""
        if self._left:
            self._left = 0
            self._profiler.stop()
