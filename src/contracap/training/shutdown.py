"""The signals that ask a run to end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interrupted(Exception):
    """A run that ended because it was asked to, after a checkpoint from which it can continue.

    Attributes:
        exit_status: EX_TEMPFAIL of sysexits.h; a scheduler can requeue the job on it.
    """

    exit_status = 75


class ShutdownRequested(BaseException):
    """Raised while a run that is asked to end waits for something. Not an `Exception`, so that no handler on the way
    takes it for a failure."""


class ShutdownSignal:
    """Set when the process is asked to end. It then ends at once, or after the current step and a checkpoint."""

    def __init__(self) -> None:
        self.received = False
        self._at_once = self._raised = False

    @contextmanager
    def at_once(self, holds: bool = True) -> Iterator[None]:
        """A context in which the signal raises at once; with `holds` false, it is only noted.

        Raises: ShutdownRequested: if the signal has come, even before the context was entered. Also if a library turned
            it into another error on the way, as torch does while it reads a checkpoint.
        """
        before = self._at_once, self._raised
        self._at_once, self._raised = holds, False
        try:
            self._check()
            yield
        except Exception:
            if self._raised:
                raise ShutdownRequested from None
            raise
        finally:
            self._at_once, self._raised = before

    @property
    def ends_at_once(self) -> bool:
        """True if the signal would raise now."""
        return self._at_once

    def note(self) -> None:
        """Note that the signal has come."""
        self.received = True
        self._check()

    def _check(self) -> None:
        if self.received and self._at_once:
            self._raised = True
            raise ShutdownRequested


@contextmanager
def shutdown_signal() -> Iterator[ShutdownSignal]:
    """A context in which SIGTERM, SIGUSR1 and the first Ctrl-C are noted, so that a run can finish its step and write a
    checkpoint. The second Ctrl-C does what it does outside the context.

    Signals go to the main thread; in another thread the context changes nothing.
    """
    shutdown = ShutdownSignal()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            earlier = before[number]
            if shutdown.received and callable(earlier):
                earlier(number, frame)
                return
            if not shutdown.ends_at_once and os.environ.get("RANK", "0") == "0":  # one of torchrun's ranks says so
                # Not print: the signal may have interrupted another write to the same stream.
                os.write(2, b"\nending after a checkpoint; Ctrl-C again ends at once\n")
        shutdown.note()

    if threading.current_thread() is not threading.main_thread():
        yield shutdown
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield shutdown
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def exit_on_signal(advice: str = "resume=true continues from the last checkpoint") -> Iterator[None]:
    """A context in which Ctrl-C and SIGTERM end the process without a traceback, unless `shutdown_signal` notes them.

    Files on the disk are complete at any moment.

    Args:
        advice: how to continue, for the message.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\ncontracap: error: interrupted; {advice}\n".encode())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
