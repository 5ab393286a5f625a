"""What a run tells: a line per record in metrics.jsonl, TensorBoard curves, progress on the terminal; and a line in
skipped.jsonl for each sample that could not be used."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contracap.data.order import Skip
from contracap.files import write_text

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
MOST_WARNINGS = 10
logger = logging.getLogger(__name__)


class Recorder:
    """Records numbers by step. On a terminal a progress bar, elsewhere a log line per record."""

    def __init__(self, folder: Path, *, start: int, total_steps: int):
        """`start`: steps done before; records beyond it, of a run that was cut off, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        _forget_after(self._path, start)
        self._file = self._path.open("a")
        _forget_after(folder / SKIPPED_FILE, start)
        self._skipped_file = (folder / SKIPPED_FILE).open("a")
        self._warnings = 0
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._bar = tqdm(total=total_steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self._done, self._total = start, total_steps
        self._numbers: Mapping[str, float] = {}
        self._samples = self._steps = self._skipped = 0
        self._since = time.monotonic()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()
        self._skipped_file.close()

    def step(self, numbers: Mapping[str, float], *, samples: int) -> None:
        """A step is done; `numbers` is empty if it was skipped."""
        self._done += 1
        self._steps += 1
        self._samples += samples
        self._numbers = numbers
        self._skipped += not numbers
        self._bar.update()

    def skips(self, skips: Iterable[Skip]) -> None:
        """Write down samples that the data left out since the last step. The first ones are warned of, too."""
        for skip in skips:
            self._skipped_file.write(json.dumps({"step": self._done, **asdict(skip)}) + "\n")
            self._skipped_file.flush()
            self._warnings += 1
            if self._warnings <= MOST_WARNINGS:
                logger.warning("skipped: %s", "".join(c if c.isprintable() else repr(c)[1:-1] for c in skip.reason))
            if self._warnings == MOST_WARNINGS:
                logger.warning("further ones are in %s only", SKIPPED_FILE)

    def log(self, counts: Mapping[str, float]) -> None:
        """Record the newest numbers, `counts`, and the speed since the last record, whatever came between included."""
        seconds = time.monotonic() - self._since
        left = seconds / self._steps * (self._total - self._done)
        skipped = {"skipped_steps": float(self._skipped)} if self._skipped else {}
        speed = {"samples_per_second": self._samples / seconds}
        self.record(self._done, {**self._numbers, **skipped, **counts, **speed}, left)
        self._samples = self._steps = self._skipped = 0
        self._since = time.monotonic()

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Write numbers down; the system has the line when this returns."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar.disable:
            left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
            logger.info("step %d of %d%s: %s", step, self._total, left, text)
        else:
            self._bar.set_postfix_str(text)


class Silent(Recorder):
    """What the other ranks have: it records nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, numbers: Mapping[str, float], *, samples: int) -> None:
        pass

    def skips(self, skips: Iterable[Skip]) -> None:
        pass

    def log(self, counts: Mapping[str, float]) -> None:
        pass

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def _forget_after(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_text(path, "".join(kept))
