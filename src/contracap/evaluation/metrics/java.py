"""Java and the jars of `pycocoevalcap`.

The package is not imported: its scorers download files, write into the package's folder, and leave processes running.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

LOCALE = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")  # otherwise some countries write 0,5


class UnavailableError(ValueError):
    """A program or a file that a metric needs is not installed; the message says how to get it."""


class JavaError(ValueError):
    """A Java program cannot be run, failed, or did not answer line by line."""


def find_java() -> Path | None:
    """Return the Java executable of `JAVA_HOME`, else of `PATH`; None if none runs."""
    home = os.environ.get("JAVA_HOME")
    folders = [*([str(Path(home) / "bin")] if home else []), None]
    found = (shutil.which("java", path=folder) for folder in folders)
    return next((Path(java) for java in found if java and can_run(java)), None)


def find_jar(name: str) -> Path | None:
    """Return a file inside the installed `pycocoevalcap`; None if it is missing."""
    package = find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    jars = (Path(folder) / name for folder in folders or ())
    return next((jar for jar in jars if jar.is_file()), None)


def java_and_jar(name: str, *, what: str, instead: str) -> tuple[Path, Path]:
    """Return Java and a jar of `pycocoevalcap`.

    Args:
        name: path of the jar in the package.
        what: the metric or tokenizer that needs them, for the error.
        instead: a sentence about what a user without them can do.

    Raises: UnavailableError: if one of them is missing.
    """
    java, jar = find_java(), find_jar(name)
    if java is None:
        raise UnavailableError(
            f"{what} needs a Java runtime (8 or later, tested with 17); none found in JAVA_HOME or PATH. "
            f"Debian/Ubuntu: apt install default-jre-headless. {instead}"
        )
    if jar is None:
        raise UnavailableError(f"{what} needs pycocoevalcap: pip install 'contracap[coco]'")
    return java, jar


def failure(what: str, status: int | None, output: bytes) -> JavaError:
    """Return the error of a program that ended with this exit status; it quotes the first line of the output."""
    reason = next(filter(None, map(str.strip, output.decode(errors="replace").splitlines())), "no message")
    return JavaError(f"{what} failed (exit status {status}): {reason}")


@contextmanager
def java_errors(what: str) -> Iterator[None]:
    """A context in which an error of the system, such as too little memory, becomes a `JavaError` of the program."""
    try:
        yield
    except OSError as error:
        raise JavaError(f"{what} could not be run: {error}") from error


@cache
def can_run(java: str) -> bool:
    """Return True if this Java runs: macOS has one that only says that there is none."""
    try:
        return subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
