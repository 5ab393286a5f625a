"""Java and the jars of `pycocoevalcap`: where they are, and what a failed run had to say. The package is not imported:
its scorers download at once, write into its own folder, and leave processes running.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

LOCALE = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")  # or else 0,5 somewhere


class UnavailableError(ValueError):
    """Something that a metric needs is not installed; the message says what it is and how to get it."""


class JavaError(ValueError):
    """A Java program could not be run, failed, or did not answer line for line."""


def find_java() -> Path | None:
    """The Java executable of `JAVA_HOME`, else of `PATH`; None if there is none that runs."""
    home = os.environ.get("JAVA_HOME")
    folders = [*([str(Path(home) / "bin")] if home else []), None]
    found = (shutil.which("java", path=folder) for folder in folders)
    return next((Path(java) for java in found if java and runs(java)), None)


def find_jar(name: str) -> Path | None:
    """A file inside the installed `pycocoevalcap`; None if it is missing."""
    package = find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    jars = (Path(folder) / name for folder in folders or ())
    return next((jar for jar in jars if jar.is_file()), None)


def java_and_jar(name: str, *, what: str, instead: str) -> tuple[Path, Path]:
    """Java and a jar of `pycocoevalcap`.

    Args:
        name: of the jar, in the package.
        what: needs them.
        instead: what a user without them can do, a sentence.

    Raises:
        UnavailableError: if one of them is missing.
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
    """The error of a program that ended with this exit status, with the first line that it wrote."""
    reason = next(filter(None, map(str.strip, output.decode(errors="replace").splitlines())), "no message")
    return JavaError(f"{what} failed (exit status {status}): {reason}")


@contextmanager
def running(what: str) -> Iterator[None]:
    """What the system refuses in this block, such as memory or room for files, becomes a `JavaError` of the program."""
    try:
        yield
    except OSError as error:
        raise JavaError(f"{what} could not be run: {error}") from error


@cache
def runs(java: str) -> bool:
    """Whether this is a Java: macOS has one that only says that there is none."""
    try:
        return subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
