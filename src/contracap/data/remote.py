"""Files elsewhere: patterns of names, folders, and streams that outlast the failures of a network."""

import io
import logging
import math
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem

from contracap.config import ConfigError

BUFFER_BYTES = 4 * 2**20  # without it every header of a remote shard costs a round trip
MAX_NAMES = 10**7  # that one pattern may stand for
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between one attempt and the next
CONNECT_SECONDS = 15.0
READ_SECONDS = 30.0  # without a byte
COMMAND_SECONDS = 300.0  # the same for `pipe:`, whose command may have its own work to do

WEB = ("http://", "https://")
S3 = ("s3://", "s3a://")
GOOGLE = ("gs://", "gcs://")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")

logger = logging.getLogger(__name__)
T = TypeVar("T")

# File systems in use, which fsspec forgets in a forked process. To finalise one there would unhook sockets of the
# parent's event loop, and wait for a thread that the fork did not copy; so the child holds on to them, unused.
_KEPT: set[AbstractFileSystem] = set()
_jitter = random.SystemRandom()  # the shared generator belongs to training, and forked workers would all wait alike


class RemoteError(OSError):
    """A remote file or folder, or the output of a command, that cannot be read; the message says where and why."""


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for, in the shell's order; a name without braces is itself.

    Args:
        pattern: any number of ranges `{00000..00331}`, whose zeros in front are kept, and lists `{train,val}`.

    Raises:
        ValueError: if a brace holds neither, holds another, or has no partner; if names are joined by `::`; if they
            are more than `MAX_NAMES`.
    """
    if re.search(r"\.(tar|tar\.gz|tgz)::", pattern):
        raise ValueError(f"{pattern!r}: names of shards cannot be joined by '::'; give a list of names")
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in literal for literal in parts[::2] for brace in "{}"):
        raise ValueError(f"{pattern!r}: every {{ needs its }}, and none may hold another")
    choices = [_choices(part, pattern) if number % 2 else [part] for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise _too_many(pattern)
    return ["".join(chosen) for chosen in product(*choices)]


def commands_in(paths: str | Iterable[str]) -> list[str]:
    """Paths, or names that their braces stand for, that are shell commands: `pipe:` and a command.

    A pattern that stands for too many names, or for none, is not a path, and is not opened either.
    """
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        try:
            names = [path] if path.startswith("pipe:") else expand(path)
        except ValueError:  # not a path that is opened
            names = []
        found += [name for name in names if name.startswith("pipe:")]
    return found


CONSENT = "if that is what you want, say --allow-commands (in Python: allow_commands=True)"


def require_consent(paths: str | Iterable[str], allow: bool, advice: str = CONSENT) -> None:
    """Called with the paths that a file names, which others may have written, before any of them is opened.

    Raises: ConfigError: if one is a shell command, and commands are not allowed.
    """
    if not allow and (commands := commands_in(paths)):
        raise ConfigError(f"a path runs a shell command, {commands[0]!r}: {advice}")


def _too_many(pattern: str) -> ValueError:
    return ValueError(f"{pattern!r} stands for more than {MAX_NAMES:,} names: give a folder, or fewer")


def _choices(inside: str, pattern: str) -> list[str]:
    if bounds := RANGE.fullmatch(inside):
        padded = any(bound.startswith("0") and len(bound) > 1 for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        if max(map(len, bounds.groups())) > 18:  # int() refuses thousands of digits
            raise _too_many(pattern)
        first, last = map(int, bounds.groups())
        if abs(last - first) >= MAX_NAMES:
            raise _too_many(pattern)
        step = 1 if first <= last else -1
        return [str(number).zfill(width) for number in range(first, last + step, step)]
    items = inside.split(",")
    if len(items) == 1 or any(RANGE.fullmatch(item) for item in items):
        raise ValueError(
            f"{pattern!r}: {{{inside}}} is neither a range such as {{00000..00331}} nor a list such as {{train,val}}"
        )
    return items


def files_in(folder: str) -> list[str]:
    """The files of a remote folder, without its subfolders, in the order of their names.

    Raises:
        FileNotFoundError: if there is no such folder.
        RemoteError: if it cannot be listed, after all attempts.
    """

    def listed() -> list[str]:
        system, path = _file_system(folder)
        return [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]

    names = (name.rpartition("/")[2] for name in _persistently(listed, folder, "cannot list it"))
    return [f"{folder.rstrip('/')}/{name}" for name in sorted(names)]


def upload(path: str | Path, url: str) -> None:
    """Copies a local file to an object store, where it appears whole or not at all.

    Raises:
        RemoteError: if that fails, after all attempts.
    """

    def sent() -> None:
        system, name = _file_system(url)
        system.put_file(str(path), name)

    _persistently(sent, url, "cannot write it")


@contextmanager
def opened(name: str) -> Generator[IO[bytes], None, None]:
    """A file as a buffered stream of bytes, to be read from its start to its end.

    Where reading a remote file fails, it is opened again at the position reached, after a pause (`PAUSES`; the count
    begins again with every byte). What will not change, such as a missing file or permission, fails at once. http(s),
    s3 and gs have time-outs for each step; whether other protocols notice a silent peer depends on their libraries.

    Args:
        name: a path, a URL of any protocol of fsspec, or `pipe:` and a shell command whose output is the file. The
            command runs with all permissions of the process: take such names from the command line, from a file with
            consent (`require_consent`), never from data. The shell tells the exit status of a pipeline's last command.

    Raises:
        OSError: if a local file cannot be read.
        FileNotFoundError: if there is no such file.
        RemoteError: if reading fails after all attempts, or a command does or is silent for `COMMAND_SECONDS`.
    """
    if name.startswith("pipe:"):
        with io.BufferedReader(_CommandOutput(name), BUFFER_BYTES) as stream:
            yield stream
            stream.read(BUFFER_BYTES)  # an archive ends before its file does; the command may still have failed
    elif "://" in name:
        with io.BufferedReader(_RemoteFile(name), BUFFER_BYTES) as stream:
            yield stream
    else:
        with open(name, "rb") as stream:
            yield stream


class _RemoteFile(io.RawIOBase):
    """A remote file read from start to end; where that fails it is opened again at the position reached."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._size: int | None = None
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = _persistently(lambda: self._read(len(buffer)), self._url, f"failed at byte {self._position:,}")
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, length: int) -> bytes:
        try:
            if self._file is None:
                self._file, self._size = _open_at(self._url, self._position)
            content = self._file.read(length)
            if not content and self._size is not None and self._position < self._size:
                raise EOFError(f"it ended before its {self._size:,} bytes")
        except BaseException:
            self._drop()
            raise
        return content

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it is broken already
                file.close()

    def close(self) -> None:
        self._drop()
        super().close()


class _CommandOutput(io.RawIOBase):
    """What a shell command writes; its end is an error if the command failed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
        self._process = subprocess.Popen(
            name.removeprefix("pipe:"),
            shell=True,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,  # the shell and all that it starts can be ended together
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        output = cast(Any, self._process.stdout)
        if not wait([output], COMMAND_SECONDS):
            raise RemoteError(f"{self._name}: no output for {COMMAND_SECONDS:g} seconds")
        length = output.readinto(buffer)
        if not length:
            self._check_status()
        return length

    def _check_status(self) -> None:
        try:
            status = self._process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            raise RemoteError(f"{self._name}: still running {COMMAND_SECONDS:g} seconds after its output") from None
        if status:
            ended = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
            raise RemoteError(f"{self._name}: {ended}: {self._last_complaint() or 'no word on stderr'}")

    def _last_complaint(self) -> str:
        length = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, length - 4096))
        lines = self._complaints.read().decode("utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            cast(IO[bytes], self._process.stdout).close()
            self._process.wait()
            self._complaints.close()
        super().close()


def _persistently(attempt: Callable[[], T], url: str, failure: str) -> T:
    """The result of an attempt, repeated after each of the `PAUSES` while that may help."""
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such file or folder, or no permission to see it: {url}") from error
        except ImportError as error:
            raise RemoteError(f"{url}: {error} (for http, s3 and gs: pip install 'contracap[data]')") from error
        except Exception as error:  # the libraries that fsspec uses raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            if number > len(PAUSES) or _will_not_change(error):
                times = "1 attempt" if number == 1 else f"{number} attempts"
                raise RemoteError(f"{url}: {failure} after {times}: {reason}") from error
            pause = PAUSES[number - 1] * _jitter.uniform(0.5, 1.5)
            logger.warning("%s: %s (%s); another attempt in %.1f s", url, failure, reason, pause)
            time.sleep(pause)


def _will_not_change(error: Exception) -> bool:
    """Whether another attempt is in vain: the server refused this very request, or there is nothing to ask it with."""
    status = getattr(error, "status", None)  # of aiohttp; then those of Google Cloud and of Hugging Face
    if status is None:
        status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in {408, 425, 429}  # time-out, too early, too many requests
    return isinstance(error, PermissionError | IsADirectoryError | ValueError) or "Credentials" in type(error).__name__


def _open_at(url: str, position: int) -> tuple[Any, int | None]:
    """A remote file from a position on, and its size, if that is known."""
    system, path = _file_system(url)
    if url.startswith(WEB):
        return _open_web_file_at(system, path, position)
    file = system.open(path, "rb", cache_type="none")  # every read is one request; the buffer around it reads ahead
    file.seek(position)
    return file, getattr(file, "size", None)


def _open_web_file_at(system: AbstractFileSystem, url: str, position: int) -> tuple[Any, int | None]:
    """One request for all that is left, because many servers have no ranges and signed URLs allow no HEAD request."""
    headers = {"Accept-Encoding": "identity"}  # a position is one in the file as it is stored
    if position:
        headers["Range"] = f"bytes={position}-"
    file: Any = system.open(url, "rb", block_size=0, size=1, headers=headers)  # a stream; a size spares a HEAD
    try:
        response = file.r
        start = position if response.headers.get("Content-Range", "").startswith(f"bytes {position}-") else 0
        unwanted = position - start
        while unwanted:
            skipped = len(file.read(min(unwanted, BUFFER_BYTES)))
            if not skipped:
                raise EOFError("it ended before the bytes that were read already")
            unwanted -= skipped
        return file, None if response.content_length is None else start + response.content_length
    except BaseException:
        file.close()
        raise


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, with our time-outs and without its own retries where that can be had; and the path."""
    options: dict[str, Any] = {}
    if url.startswith(S3):
        timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}}
    elif url.startswith((*WEB, *GOOGLE)):
        from aiohttp import ClientTimeout

        steps = ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        if url.startswith(GOOGLE):
            options = {"requests_timeout": steps}
        else:  # files arrive as they are stored, and through a proxy if the environment names one
            options = {"client_kwargs": {"timeout": steps, "auto_decompress": False, "trust_env": True}}
    system, path = fsspec.url_to_fs(url, **options)
    if url.startswith(S3):
        system.retries = 1
    _KEPT.add(system)
    return system, path
