"""Files that are written whole or not at all, and reads that cannot hang."""

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

DISK_ERRORS = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """A context with an empty file next to `path`, which replaces `path` at the end, or is removed after an error.

    The folder is created. The file gets the default permissions. If `path` is a link, its target is replaced. If it is
    a device or a pipe, the content is written to it at the end.

    Raises: OSError: naming `path`, if it cannot be written.
    """
    path = Path(path)
    if is_stream(path):
        with _scratch(path) as partial:
            yield partial
            with _errors_name(path), partial.open("rb") as source, _open_stream(path) as stream:
                shutil.copyfileobj(source, stream)
        return
    with _errors_name(path):
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = _beside(target)
    try:
        with _write_errors_name(path):
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        with _errors_name(path):
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_stream(path: str | Path) -> bool:
    """Return True if `path` is written to and never replaced: a device, a pipe, or the file that stdout is."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or (path.is_symlink() and _own_stream(path) is not None)


def try_place(path: str | Path) -> None:
    """Check that `replace_file` can write `path`, by creating and removing a file next to it.

    Raises: OSError: naming `path`, if it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not is_stream(path):
        _beside(Path(os.path.realpath(path)) if path.is_symlink() else path).unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def require_folder(path: str | Path) -> None:
    """Refuse a file where a folder, or one of the folders above it, belongs.

    Raises: NotADirectoryError: that says what to do.
    """
    path = Path(path)
    place = next(filter(os.path.exists, (path, *path.parents)), None)
    if place is not None and not place.is_dir():
        raise NotADirectoryError(f"{place} is a file, not a folder: give another name for the folder")


def _own_stream(path: Path) -> int | None:
    """Return the descriptor of stdout or stderr if `path` is the same open file."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> BinaryIO:
    """Open `path` for writing; stdout and stderr continue at their position."""
    descriptor = _own_stream(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A context with an empty file for the content of the stream `path`."""
    with tempfile.TemporaryDirectory(prefix="contracap-") as folder:
        (partial := Path(folder, path.name)).touch()
        yield partial


def _beside(path: Path) -> Path:
    """Create an empty file in the folder of `path`, and the folder.

    Its name is short, since that of `path` may have the greatest length.
    """
    require_folder(path.parent)
    with _errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(path)  # tells a name that is too long
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    return Path(name)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """A context whose system errors name `path` instead of a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def _write_errors_name(path: Path) -> Iterator[None]:
    """A context whose errors of a full disk, which tell no file, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_ERRORS:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def path_text(path: str | Path) -> str:
    r"""Return a path as text for an output. Bytes that are not UTF-8 become `\xNN`.

    A backslash that already starts such an escape becomes `\x5c`, so that no two paths share a text.
    """
    text = os.fspath(path)
    if os.sep == "/":  # on Windows a backslash ends a folder, and every name is text
        text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", text)
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Characters that UTF-8 cannot hold, such as undecodable bytes of a file's name, are escaped as in JSON: \\udce9.
    """
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_regular(path: str | Path, max_bytes: int = 256 * 2**20) -> bytes:
    """Return the content of a regular file. Pipes, sockets and devices, which may never end, are refused.

    Raises: OSError: if it is not a regular file, cannot be read, or is larger than `max_bytes`.
    """
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than the {max_bytes:,} bytes allowed", str(path))
    return content


def check_regular(path: str | Path) -> None:
    """Refuse a path that is not a regular file.

    Raises: OSError: that says what it is.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"a {special_kind(mode)}, not a regular file", str(path))


def special_kind(mode: int) -> str:
    """Return the kind of a special file with this mode."""
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
