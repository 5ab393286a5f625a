"""What a run tells, written by one rank: a line per record in metrics.jsonl, curves on boards, progress on the
terminal; and a line for each skipped sample, spike and sample caption in a file of its own."""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contracap.data.order import Skip
from contracap.files import read_regular, write_text
from contracap.progress import progress_bar
from contracap.training.boards import Board

METRICS_FILE = "metrics.jsonl"
MAX_METRICS = 2**31  # bytes
SKIPPED_FILE = "skipped.jsonl"
SPIKES_FILE = "spikes.jsonl"
CAPTIONS_FILE = "captions.jsonl"
MOST_WARNINGS = 10
logger = logging.getLogger(__name__)


class Recorder:
    """Records numbers by step. On a terminal a progress bar, elsewhere a log line per record."""

    def __init__(self, folder: Path, *, start: int, total_steps: int, boards: Sequence[Board]):
        """`start`: steps done before; records beyond it, of a run that was cut off, are dropped."""
        self._folder, self._boards = folder, boards
        for name in (METRICS_FILE, SKIPPED_FILE, SPIKES_FILE, CAPTIONS_FILE):
            _forget_after(folder / name, start)
        self._warnings = 0
        self._bar = progress_bar(total=total_steps, initial=start, unit="step", dynamic_ncols=True)
        now = time.monotonic()  # tqdm's own clock may be set back, and its rates become negative
        vars(self._bar).update(_time=time.monotonic, start_t=now, last_print_t=now)
        self._total = total_steps

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for board in self._boards:
            board.close(failed=error is not None)

    def progress(self) -> None:
        """A step is done."""
        self._bar.update()

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        """Write numbers down, if there are any; the system has the line when this returns."""
        if not numbers:
            return
        self._line(METRICS_FILE, {"step": step, **numbers})
        for board in self._boards:
            board.figures(step, numbers)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar.disable:
            left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
            logger.info("step %d of %d%s: %s", step, self._total, left, text)
        else:
            shown = {"loss": "loss {:.4g}", "samples_per_second": "{:.4g} samples/s"}  # what a line has room for
            self._bar.set_postfix_str(", ".join(shown[name].format(numbers[name]) for name in shown if name in numbers))

    def skips(self, step: int, skips: Iterable[Skip]) -> None:
        """Write down samples that the data left out since the last step. The first ones are warned of, too."""
        for skip in skips:
            self._line(SKIPPED_FILE, {"step": step, **asdict(skip)})
            self._warnings += 1
            if self._warnings <= MOST_WARNINGS:
                logger.warning("skipped: %s", "".join(c if c.isprintable() else repr(c)[1:-1] for c in skip.reason))
            if self._warnings == MOST_WARNINGS:
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
        for board in self._boards:
            board.captions(step, {caption["key"]: caption["caption"] for caption in captions})

    def _line(self, name: str, values: Mapping[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


class Silent(Recorder):
    """What the other ranks have: it records nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        pass

    def progress(self) -> None:
        pass

    def record(self, step: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> None:
        pass

    def skips(self, step: int, skips: Iterable[Skip]) -> None:
        pass

    def spike(self, spike: Mapping[str, Any]) -> None:
        pass

    def captions(self, step: int, captions: Sequence[Mapping[str, Any]]) -> None:
        pass


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
