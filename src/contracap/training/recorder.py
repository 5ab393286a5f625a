"""The records of a run in its folder, on the terminal and in its loggers."""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contracap.data.order import SkippedSample
from contracap.files import read_regular, write_text
from contracap.progress import progress_bar
from contracap.training.loggers import RunLogger
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

    def __init__(self, folder: Path | None, *, start: int, total_steps: int, loggers: Sequence[RunLogger] = ()):
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

    def show_progress(self) -> None:
        """Show that a step is done."""
        self._bar.update()

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Record numbers, if there are any. The line is with the operating system when this returns."""
        if not numbers or self._folder is None:
            return
        self._append(METRICS_FILE, {"step": step, **numbers})
        for run_logger in self._loggers:
            run_logger.log_numbers(step, numbers)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar.disable:
            left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
            logger.info("step %d of %d%s: %s", step, self._total, left, text)
        else:
            shown = {"loss": "loss {:.4g}", "samples_per_second": "{:.4g} samples/s"}  # all that fits into a line
            self._bar.set_postfix_str(", ".join(shown[name].format(numbers[name]) for name in shown if name in numbers))

    def record_skips(self, step: int, skips: Iterable[SkippedSample]) -> None:
        """Record samples that were left out since the last step. Warn of the first ones."""
        for skip in skips if self._folder else ():
            self._append(SKIPPED_FILE, {"step": step, **asdict(skip)})
            self._warnings += 1
            if self._warnings <= MAX_WARNINGS:
                logger.warning("skipped: %s", escaped(skip.reason))
            if self._warnings == MAX_WARNINGS:
                logger.warning("further ones are in %s only", SKIPPED_FILE)

    def record_spike(self, spike: Mapping[str, Any]) -> None:
        """Record an unusual step, which its field `step` names."""
        self._append(SPIKES_FILE, spike)

    def record_captions(self, step: int, captions: Sequence[Mapping[str, Any]]) -> None:
        """Record sample captions of this step, if there are any; each has fields `key` and `caption`."""
        if not captions:
            return
        for caption in captions:
            self._append(CAPTIONS_FILE, {"step": step, **caption})
        for run_logger in self._loggers:
            run_logger.log_captions(step, {caption["key"]: caption["caption"] for caption in captions})

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_null_nonfinite(values), allow_nan=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, which may still be going on, in order. Numbers that were not finite are None."""
    text = read_regular(folder / METRICS_FILE, MAX_METRICS).decode("utf-8")
    complete, _, _ = text.rpartition("\n")  # the last line may be half written
    return [json.loads(line) for line in complete.splitlines()]


def _null_nonfinite(value: Any) -> Any:
    """Return the value with None instead of NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _null_nonfinite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_null_nonfinite(each) for each in value]
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
