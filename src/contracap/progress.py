"""Progress bars, on a terminal alone, and none where log lines of warnings are off."""

import logging
import time
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

from tqdm import tqdm

PAUSE = 30.0  # seconds between log lines of what is waited for

logger = logging.getLogger(__name__)


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | Callable[[], int | None] | None = None,
    disable: bool = False,
    **options: Any,
) -> tqdm:
    """A bar of tqdm. `--quiet` is known by the level of the package's logger.

    Args:
        total: how many steps there are, or what counts them, in a thread of its own.
        options: tqdm's.
    """
    quiet = not logging.getLogger("contracap").isEnabledFor(logging.WARNING)
    known = None if callable(total) else total
    bar = tqdm(iterable, total=known, disable=True if disable or quiet else None, **options)
    if callable(total) and not bar.disable:
        Thread(target=_set_total, args=(bar, total), daemon=True).start()
    return bar


def waiting(bar: tqdm) -> Callable[[int, str], None]:
    """What to call every second with how many images are done and what is waited for, or nothing any more. The bar says
    it; where none is shown, a log line does now and then."""
    told = time.monotonic()

    def tell(done: int, what: str) -> None:
        nonlocal told
        if not bar.disable:
            bar.set_postfix_str(f"waiting for {what}" if what else "")
        elif what and time.monotonic() >= told + PAUSE:
            told = time.monotonic()
            logger.warning("waiting for %s; %s images are done", what, f"{done:,}")

    return tell


def _set_total(bar: tqdm, count: Callable[[], int | None]) -> None:
    bar.total = count()
