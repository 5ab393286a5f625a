"""Files that appear whole or not at all, and reading that ends."""

import errno
import os
import stat
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


def read_regular(path: str | Path, max_bytes: int = 256 * 2**20) -> bytes:
    """Return the content of a regular file. Pipes, sockets and devices may never end: they are refused unread.

    What is larger than the default is not an image.

    Raises: OSError: if it is not a regular file, cannot be read, or is larger than `max_bytes`.
    """
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than the {max_bytes:,} bytes allowed", str(path))
    return content


def check_regular(path: str | Path) -> None:
    """Refuse what is there but is not a regular file.

    Raises: OSError: that says what it is.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"a {special_kind(mode)}, not a regular file", str(path))


def special_kind(mode: int) -> str:
    """What a file of this mode is that is neither a regular one nor a folder."""
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
