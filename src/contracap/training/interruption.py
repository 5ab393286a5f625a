"""A run that is asked to end: what a scheduler says before it takes the machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """A run that ended because it was asked to, behind a checkpoint from which it can go on.

    Attributes:
        exit_status: the sysexits.h code of a failure that another try gets over; a scheduler can requeue on it.
    """

    exit_status = 75


class Requests:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def requests_to_end() -> Iterator[Requests]:
    """Within it, SIGTERM and SIGUSR1 do nothing but leave a note, so that a step and a checkpoint are finished.

    Signals go to the main thread; in another one nobody is asked.
    """
    requests = Requests()

    def note(number: int, frame: FrameType | None) -> None:
        requests.received = True

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
