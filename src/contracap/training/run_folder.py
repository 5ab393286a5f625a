"""The run folder: one process at a time trains in it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from contracap.training.checkpoint import CheckpointError, describe_error

try:
    import fcntl
except ImportError:  # not on Windows, where two runs at once are not noticed
    fcntl = None

LOCK_FILE = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in the folder.

    The folder is created if it does not exist, and removed again if it is empty at the end. The system releases the
    lock when the process ends, even if it is killed.

    Raises: CheckpointError: if another process trains there, or the folder cannot be created.
    """
    try:
        created = _create(folder)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the run cannot be written there: {describe_error(error)}") from None
    with file:
        _lock(file, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    if created:
                        folder.rmdir()


def _create(folder: Path) -> bool:
    """Create the folder; return False if it exists."""
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
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read(200).strip() or "nobody knows which"
            raise CheckpointError(
                f"{folder}: another run is at work there ({who}): wait for its end, or choose another out"
            ) from None
        except OSError:  # a file system without locks
            pass
    with suppress(OSError):  # if the disk is full, the next write says so
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
