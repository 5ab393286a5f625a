"""Remote files and folders, and the output of shell commands: streams that outlast the failures of a network."""

import io
import logging
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem

from contracap.files import check_regular

BUFFER_BYTES = 4 * 2**20  # without a buffer, every header of a remote shard costs a round trip
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between one attempt and the next
CONNECT_SECONDS = 15.0
READ_SECONDS = 30.0  # without a byte
COMMAND_SECONDS = 300.0  # the same for `pipe:`, whose command may have its own work to do

WEB = ("http://", "https://")
S3 = ("s3://", "s3a://")
GOOGLE = ("gs://", "gcs://")

logger = logging.getLogger(__name__)
T = TypeVar("T")

# File systems in use, which fsspec forgets in a forked process. Finalising one there would unhook sockets of the
# parent's event loop, and wait for a thread that the fork did not copy. So the child keeps them, unused.
_KEPT: set[AbstractFileSystem] = set()
_jitter = random.SystemRandom()  # the shared generator belongs to training, and forked workers would all wait alike


class RemoteError(OSError):
    """A remote file or folder, or the output of a command, that cannot be read. The message says where and why."""


def list_files(folder: str) -> list[str]:
    """Return the files of a remote folder, without its subfolders, sorted by name.

    Raises:
        FileNotFoundError: if there is no such folder.
        RemoteError: if it cannot be listed, after all attempts.
    """

    def list_names() -> list[str]:
        system, path = _file_system(folder)
        return [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]

    names = (name.rpartition("/")[2] for name in _retry(list_names, folder, "cannot list it"))
    return [f"{folder.rstrip('/')}/{name}" for name in sorted(names)]


def upload(path: str | Path, url: str) -> None:
    """Copy a local file to an object store, where it appears whole or not at all.

    Raises:
        RemoteError: if that fails, after all attempts.
    """

    def send() -> None:
        system, name = _file_system(url)
        system.put_file(str(path), name)

    _retry(send, url, "cannot write it")


@contextmanager
def open_file(name: str) -> Generator[IO[bytes], None, None]:
    """Open a file as a buffered stream of bytes, to be read from start to end.

    If reading a remote file fails, it is opened again at the position reached, after a pause (`PAUSES`; every byte
    resets the count). A lasting failure, such as a missing file or permission, raises an error at once. http(s), s3
    and gs have time-outs for each step; other protocols may wait for a silent server.

    Args:
        name: a path, a URL of any protocol of fsspec, or `pipe:` and a shell command whose output is the file. The
            command has all permissions of the process: take such names from the command line, or from a file with
            consent (`require_consent`), never from data. The exit status is that of a pipeline's last command.

    Raises:
        OSError: if a local file cannot be read, or is a pipe or a device, which may never end.
        FileNotFoundError: if there is no such file.
        RemoteError: if reading fails after all attempts, or a command fails or is silent for `COMMAND_SECONDS`.
    """
    if name.startswith("pipe:"):
        with io.BufferedReader(_CommandOutput(name), BUFFER_BYTES) as stream:
            yield stream
            stream.read(BUFFER_BYTES)  # an archive ends before its file does; the command may still have failed
    elif "://" in name:
        with io.BufferedReader(_RemoteFile(name), BUFFER_BYTES) as stream:
            yield stream
    else:
        check_regular(name)
        with open(name, "rb") as stream:
            yield stream


class _RemoteFile(io.RawIOBase):
    """A remote file, read from start to end; after a failure it is opened again at the position reached."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._size: int | None = None
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = _retry(lambda: self._read(len(buffer)), self._url, f"failed at byte {self._position:,}")
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
    """The output of a shell command; its end is an error if the command failed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
        self._process = subprocess.Popen(
            name.removeprefix("pipe:"),
            shell=True,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
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
            raise RemoteError(f"{self._name}: {ended}: {self._last_error_line() or 'no word on stderr'}")

    def _last_error_line(self) -> str:
        length = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, length - 4096))
        lines = self._stderr.read().decode("utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            cast(IO[bytes], self._process.stdout).close()
            self._process.wait()
            self._stderr.close()
        super().close()


def _retry(attempt: Callable[[], T], url: str, failure: str) -> T:
    """Return the result of an attempt, repeated after each of the `PAUSES` while that may help."""
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
            if number > len(PAUSES) or _is_permanent(error):
                times = "1 attempt" if number == 1 else f"{number} attempts"
                raise RemoteError(f"{url}: {failure} after {times}: {reason}") from error
            pause = PAUSES[number - 1] * _jitter.uniform(0.5, 1.5)
            logger.warning("%s: %s (%s); another attempt in %.1f s", url, failure, reason, pause)
            time.sleep(pause)


def _is_permanent(error: Exception) -> bool:
    """Return whether another attempt would fail, too: the server refused the request, or credentials are missing."""
    status = getattr(error, "status", None)  # of aiohttp; then those of Google Cloud and of Hugging Face
    if status is None:
        status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in {408, 425, 429}  # time-out, too early, too many requests
    return isinstance(error, PermissionError | IsADirectoryError | ValueError) or "Credentials" in type(error).__name__


def _open_at(url: str, position: int) -> tuple[Any, int | None]:
    """Open a remote file at a position; return it and its size, if that is known."""
    system, path = _file_system(url)
    if url.startswith(WEB):
        return _open_web_file_at(system, path, position)
    file = system.open(path, "rb", cache_type="none")  # every read is one request; the buffer around it reads ahead
    file.seek(position)
    return file, getattr(file, "size", None)


def _open_web_file_at(system: AbstractFileSystem, url: str, position: int) -> tuple[Any, int | None]:
    """Send one request for the rest: many servers have no ranges, and signed URLs allow no HEAD request."""
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
    """Return the file system of a URL, with our time-outs and without retries of its own if possible, and the path."""
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
