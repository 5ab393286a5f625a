"""Files that appear whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; at the end it takes the name `path`, or vanishes if there was an error.

    The folder is made if need be. Rights are those of any new file.

    Raises: OSError: of `path`, if there can be no such file.
    """
    path = Path(path)
    partial = _beside(path)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        with _named(path):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def try_place(path: str | Path) -> None:
    """Make and remove a file beside `path`, as `replacing` would: what can be wrong is found before there is something
    to write.

    Raises: OSError: of `path`, if there can be no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _beside(path).unlink()


def _beside(path: Path) -> Path:
    """A new empty file in the folder of `path`, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    return Path(name)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's word on a name nobody gave becomes one on `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all. What UTF-8 cannot hold, such as bytes of a file's name that were no text,
    is written as JSON and Python spell it: \\udce9."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
