"""What verbs say: what went wrong, and on the way as much as `--quiet` and `--verbose` want."""

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from contracap.wording import escaped


class EmptyPathError(Exception):
    """An empty text where a path belongs."""


class Verbosity:
    """What every verb takes, wherever it stands among the arguments.

    Attributes:
        quiet: results and errors alone, without bars, summaries and log lines.
        verbose: also the traceback of what went wrong, and log lines of every level.
    """

    quiet: bool = False
    verbose: bool = False

    def take(self, arguments: Sequence[str]) -> list[str]:
        """The other arguments. If both are given, --verbose wins."""
        self.verbose = "--verbose" in arguments
        self.quiet = "--quiet" in arguments and not self.verbose
        logging.disable(logging.WARNING if self.quiet else logging.NOTSET)  # progress bars go by this, too
        logging.getLogger("contracap").setLevel(logging.DEBUG if self.verbose else logging.NOTSET)
        return [word for word in arguments if word not in ("--quiet", "--verbose")]


verbosity = Verbosity()


def say(line: str, *, to_stderr: bool = False) -> None:
    """Print a line unless --quiet was given."""
    if not verbosity.quiet:
        print(line, file=sys.stderr if to_stderr else sys.stdout, flush=to_stderr)


@contextmanager
def interruption(words: str = "interrupted: nothing was written; the same command starts again") -> Iterator[None]:
    """What Ctrl-C says in the block, where that does not say it itself."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or words) from None


@contextmanager
def sigterm_interrupts() -> Iterator[Callable[[], int]]:
    """Within it, SIGTERM does what Ctrl-C does: the processes at work end, and what is done is said. Gives the exit
    status, which shells derive from the signal: 130 for Ctrl-C, 143 for SIGTERM.

    Signals go to the main thread; in another one nothing changes.
    """
    received = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.SIGTERM
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if is_main else None
    try:
        yield lambda: 128 + received
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def fail(message: str, *, status: int = 1) -> int:
    """Print one line on stderr and return the exit status. Line breaks and control characters are escaped."""
    print(f"contracap: error: {escaped(message.strip())}", file=sys.stderr)
    return status


def written(write: Callable[..., None], *arguments: object) -> bool:
    """Whether a file could be written. If not, a line of its own says why: figures and other errors still follow."""
    try:
        write(*arguments)
    except OSError as error:
        fail(message(error))
        return False
    return True


def is_for_the_user(error: Exception) -> bool:
    """Whether an error tells a user what was wrong: one that this package raised, or the system's word on a file.

    Anything else is a mistake of ours, and is shown with its traceback.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    raised_by_us = raised_in.is_relative_to(Path(__file__).parent.parent) and isinstance(
        error, ValueError | ImportError
    )
    return raised_by_us or isinstance(error, OSError) or type(error).__module__.startswith("contracap.")


def message(error: Exception) -> str:
    """What was wrong, and with which file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
