"""Files that appear whole or not at all, and reading that ends."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; at the end it takes the name `path`, or vanishes if there was an error.

    The folder is made if need be. The file gets the default permissions. A link stays, and what it leads to is
    replaced. A device or a pipe stays, too: the content is written to it at the end.

    Raises: OSError: of `path`, if there can be no such file.
    """
    path = Path(path)
    if is_stream(path):
        with _scratch(path) as partial:
            yield partial
            with _named(path), partial.open("rb") as source, _open_stream(path) as stream:
                shutil.copyfileobj(source, stream)
        return
    with _named(path):
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = _beside(target)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        with _named(path):
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_stream(path: str | Path) -> bool:
    """Whether there is something at `path` that is written to and never replaced: a device, a pipe, what stdout is."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or (path.is_symlink() and _own_stream(path) is not None)


def try_place(path: str | Path) -> None:
    """Make and remove a file beside `path`, as `replacing` would: what can be wrong is found before there is something
    to write.

    Raises: OSError: of `path`, if there can be no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not is_stream(path):
        _beside(Path(os.path.realpath(path)) if path.is_symlink() else path).unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _own_stream(path: Path) -> int | None:
    """The descriptor of stdout or stderr, if `path` leads to the same open file."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> BinaryIO:
    """`path` to write to; stdout and stderr continue where they are."""
    descriptor = _own_stream(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty file for what goes to the stream `path` at the end."""
    with tempfile.TemporaryDirectory(prefix="contracap-") as folder:
        (partial := Path(folder, path.name)).touch()
        yield partial


def _beside(path: Path) -> Path:
    """A new empty file in the folder of `path`, which is made if need be. Its name is short, as that of `path` may be
    as long as names can be."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(path)  # tells a name that is too long
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    return Path(name)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's word on a name nobody gave becomes one on `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def path_text(path: str | Path) -> str:
    r"""A path as text for an output. Bytes that are not UTF-8 become `\xNN`; so that no two paths share a text, a
    backslash that already begins such an escape becomes `\x5c`."""
    text = os.fspath(path)
    if os.sep == "/":  # on Windows a backslash ends a folder, and every name is text
        text = re.sub(r"\\(?=x([89a-f][0-9a-f]|5c))", r"\\x5c", text)
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


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
