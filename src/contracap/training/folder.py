"""The run folder: one process at a time trains in it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from contracap.training.checkpoint import CheckpointError, describe

try:
    import fcntl
except ImportError:  # not on Windows, where two runs at once are not noticed
    fcntl = None

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, no other process trains in the folder. It is made if need be, and removed if nothing is in it then.
    The system lets go of the lock when the process ends, however it does.

    Raises: CheckpointError: if another process does, or there can be no such folder.
    """
    try:
        made = _make(folder)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the run cannot be written there: {describe(error)}") from None
    with file:
        _lock(file, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    if made:
                        folder.rmdir()


def _make(folder: Path) -> bool:
    """Whether there was no such folder."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _lock(file: TextIO, folder: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers have no part in it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read(200).strip() or "nobody knows which"
            raise CheckpointError(
                f"{folder}: another run is at work there ({who}): wait for its end, or choose another out"
            ) from None
        except OSError:  # a file system without locks
            pass
    with suppress(OSError):  # a full disk is told of by what is written next
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
