"""A run that is asked to end: by a scheduler before it takes the machine away, or by Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interrupted(Exception):
    """A run that ended because it was asked to, after a checkpoint from which it can go on.

    Attributes:
        exit_status: the sysexits.h code of a failure that another try gets over; a scheduler can requeue on it.
    """

    exit_status = 75


class Asked(BaseException):
    """Raised where a run waits that is asked to end; no `except Exception` on the way may take it for a failure."""


class Requests:
    """Whether this process was asked to end, and whether it does so at once or when it has finished its step."""

    def __init__(self) -> None:
        self.received = False
        self._at_once = False

    @contextmanager
    def at_once(self, holds: bool = True) -> Iterator[None]:
        """Within it, a request ends what is being done; with `holds` false, it waits again.

        Raises: Asked: if there is a request, also one that came before.
        """
        before, self._at_once = self._at_once, holds
        try:
            self._check()
            yield
        finally:
            self._at_once = before

    @property
    def ends_at_once(self) -> bool:
        """Whether a request would end what is being done."""
        return self._at_once

    def note(self) -> None:
        """There is a request."""
        self.received = True
        self._check()

    def _check(self) -> None:
        if self.received and self._at_once:
            raise Asked


@contextmanager
def requests_to_end() -> Iterator[Requests]:
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C leave a note, so that a step and a checkpoint are finished. The
    next Ctrl-C does what it did before.

    Signals go to the main thread; in another one nobody is asked.
    """
    requests = Requests()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            earlier = before[number]
            if requests.received and callable(earlier):
                earlier(number, frame)
                return
            if not requests.ends_at_once and os.environ.get("RANK", "0") == "0":  # of the ranks of torchrun, one
                # Not print: the signal may have come within another write to the same stream.
                os.write(2, b"\nending after a checkpoint; Ctrl-C again ends at once\n")
        requests.note()

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def interrupts_end_at_once(advice: str = "resume=true goes on from the last checkpoint") -> Iterator[None]:
    """Within it, a Ctrl-C or SIGTERM that nobody notes ends the process without a traceback, whatever it is doing: what
    is on the disk is whole at any moment. `advice`: how to go on.
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
