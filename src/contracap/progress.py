"""Progress bars, on a terminal alone, and none where log lines of warnings are off."""

import logging
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

from tqdm import tqdm


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


def _set_total(bar: tqdm, count: Callable[[], int | None]) -> None:
    bar.total = count()
