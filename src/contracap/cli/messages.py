"""Messages of the commands: errors, progress as `--quiet` and `--verbose` ask, and interruptions."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from contracap.wording import escaped

SAME_REQUEST = 1.0  # seconds in which several signals are one request to end


class EmptyPathError(Exception):
    """An empty text where a path belongs."""


class Verbosity:
    """The two flags that every command takes, anywhere among its arguments.

    Attributes:
        quiet: show results and errors only, without progress bars, summaries and log lines.
        verbose: also show tracebacks of errors, and debug logs.
    """

    quiet: bool = False
    verbose: bool = False

    def take(self, arguments: Sequence[str]) -> list[str]:
        """Set both flags, and return the other arguments. If both are given, --verbose wins."""
        self.verbose = "--verbose" in arguments
        self.quiet = "--quiet" in arguments and not self.verbose
        logging.disable(logging.WARNING if self.quiet else logging.NOTSET)  # progress bars go by this, too
        logging.getLogger("contracap").setLevel(logging.DEBUG if self.verbose else logging.INFO)
        return [word for word in arguments if word not in ("--quiet", "--verbose")]


verbosity = Verbosity()


def say(line: str, *, to_stderr: bool = False) -> None:
    """Print a line unless --quiet was given."""
    if not verbosity.quiet:
        print(line, file=sys.stderr if to_stderr else sys.stdout, flush=to_stderr)


@contextmanager
def interruption(
    words: str = "interrupted: nothing was written; run the command again to start over",
) -> Iterator[None]:
    """A context in which Ctrl-C shows these words, unless the block has a message of its own."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or words) from None


@contextmanager
def one_interruption() -> Iterator[Callable[[BaseException], int | None]]:
    """A context in which the first Ctrl-C or SIGTERM raises KeyboardInterrupt, and a later one ends the process.

    Those within a second are ignored: they are the same request, as `timeout` sends it to a process and to its group.
    During an import the first ends the process: an exception in the initialisation of torch aborts it. Outside the main
    thread the context changes nothing.

    Yields: a function that returns the exit status if an error is due to a signal, as shells derive it: 130 for Ctrl-C,
        143 for SIGTERM.
    """
    received = list[int]()
    ignored_until = 0.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal ignored_until
        received.append(number)
        is_first = len(received) == 1
        if _is_importing(frame) if is_first else time.monotonic() > ignored_until:
            for child in multiprocessing.active_children():
                child.kill()
            os.write(2, b"contracap: error: interrupted\n")
            os._exit(128 + received[0])
        if is_first:
            ignored_until = time.monotonic() + SAME_REQUEST
            raise KeyboardInterrupt

    def status(error: BaseException) -> int | None:
        due = received or isinstance(error, KeyboardInterrupt)
        return 128 + (received or [signal.SIGINT])[0] if due else None

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def fail(message: str, *, status: int = 1) -> int:
    """Print one line on stderr and return the exit status. Line breaks and control characters are escaped."""
    print(f"contracap: error: {escaped(message.strip())}", file=sys.stderr)
    return status


def try_write(write: Callable[..., None], *arguments: object) -> bool:
    """Write a file, and return True if that succeeded. Otherwise print why: figures and other errors still follow."""
    try:
        write(*arguments)
    except OSError as error:
        fail(message(error))
        return False
    return True


def is_for_the_user(error: Exception) -> bool:
    """Return True if an error tells a user what was wrong: this package raised it, or the system did about a file.

    Anything else is a bug, and is shown with its traceback.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    raised_by_us = raised_in.is_relative_to(Path(__file__).parent.parent) and isinstance(
        error, ValueError | ImportError
    )
    return raised_by_us or isinstance(error, OSError) or type(error).__module__.startswith("contracap.")


def message(error: Exception) -> str:
    """Return what was wrong, and with which file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
