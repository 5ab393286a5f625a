"""Progress bars on a terminal, and log lines elsewhere. With --quiet there are neither."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from contracap.wording import counted

PAUSE = 30.0  # seconds between log lines

logger = logging.getLogger(__name__)


class ProgressBar(tqdm):
    """A bar of tqdm. If none is shown, updates log a line every `PAUSE` seconds."""

    def __init__(self, iterable: Iterable[Any] | None, *, log: bool, unit: str, **options: Any) -> None:
        super().__init__(iterable, unit=unit, **options)
        self._logs = log and self.disable
        self._begun = self._logged = time.monotonic()
        self._start = self.n
        if self.disable:  # tqdm then sets neither
            self.unit, self.desc = unit, options.get("desc") or ""

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        for each in self.iterable:
            yield each
            self.update()

    def update(self, n: int | float | None = 1) -> bool | None:
        """Note that `n` more steps are done."""
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        if self._logs and time.monotonic() >= self._logged + PAUSE:
            self._logged = time.monotonic()
            logger.info(self._line())
        return None

    def _line(self) -> str:
        unit, rate = self.unit.strip(), (self.n - self._start) / max(time.monotonic() - self._begun, 1e-9)
        what = self.desc.removesuffix(": ")
        total = f" of {self.total:,}" if self.total else ""
        left = f", {tqdm.format_interval((self.total - self.n) / rate)} left" if self.total and rate else ""
        return f"{what}{': ' if what else ''}{self.n:,}{total} {unit}, {rate:.1f} {unit}/s{left}"


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | Callable[[], int | None] | None = None,
    disable: bool = False,
    log: bool = True,
    unit: str = "it",
    **options: Any,
) -> ProgressBar:
    """Return a progress bar. --quiet disables it, through the level of the package's logger.

    Args:
        total: the number of steps, or a function that counts them; it runs in a thread.
        disable: show neither a bar nor log lines.
        log: write log lines if no bar is shown.
        options: tqdm's.
    """
    silent = disable or not logging.getLogger("contracap").isEnabledFor(logging.WARNING)
    known = None if callable(total) else total
    bar = ProgressBar(
        iterable, total=known, disable=True if silent else None, log=log and not silent, unit=unit, **options
    )
    if callable(total) and not silent:
        Thread(target=_set_total, args=(bar, total), daemon=True).start()
    return bar


def logging_on(bar: ProgressBar) -> AbstractContextManager[None]:
    """Return a context in which log lines appear even if updates are far apart."""
    return in_thread(iter(lambda: bar.update(0), object()), pause=1.0)


@contextmanager
def in_thread(steps: Iterable[object], *, pause: float = 0.0) -> Iterator[None]:
    """Take the steps in a thread until there are none left or the context ends, which waits for the step in hand.

    Args:
        pause: seconds after each step.
    """
    ended = Event()

    def work() -> None:
        for _ in steps:
            if ended.wait(pause):
                break

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show_waiting(bar: tqdm) -> Callable[[int, str], None]:
    """Return a function that shows what the work waits for: on the bar, or if none is shown in a log line.

    Call it every second with the number of images that are done and the name of what is waited for, "" for nothing.
    """
    told = time.monotonic()

    def tell(done: int, what: str) -> None:
        nonlocal told
        if not bar.disable:
            bar.set_postfix_str(f"waiting for {what}" if what else "")
        elif what and time.monotonic() >= told + PAUSE:
            told = time.monotonic()
            logger.info("waiting for %s; %s done", what, counted(done, "image(s)") + (" is" if done == 1 else " are"))

    return tell


def _set_total(bar: tqdm, count: Callable[[], int | None]) -> None:
    bar.total = count()
