"""Outputs of captions: what all have in common, and lines on stdout."""

import errno
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.output_config import OutputConfigError
from contracap.apps.bulk.rows import Row

Existing = Literal["skip", "overwrite", "append"]
"""What to do with an image that already has a caption: skip it, overwrite the caption, or append another."""


UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of characters that steer a terminal or end a line
OF_ONE_IMAGE = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
}


def is_of_one_image(error: OSError | ValueError) -> bool:
    """Return whether an error belongs to one name or its folder. Others, such as a full disk, would come again."""
    if isinstance(error, ValueError):
        return not isinstance(error, OutputConfigError)
    return error.errno in OF_ONE_IMAGE


class Output(ABC):
    """A place for captions: a context that keeps what was written, however it ends.

    Attributes:
        added: captions that the output did not have.
        repeated: images that came before in the same run.
        place: where the captions are, for the user; empty for stdout.
        resumption: what the user can do after an interruption.
    """

    added = repeated = 0
    place = ""
    resumption = "the same command continues"

    def check(self, item: Item) -> None:
        """Raises: ValueError, OSError: if there is no place for this image's caption."""
        return

    def has(self, item: Item) -> bool:
        """Return whether nothing is to be done for an image. May be asked from another thread.

        Raises: ValueError, OSError: as `check`.
        """
        return False

    @abstractmethod
    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        """Take in the captions of a batch; return why some of its images have none.

        Raises: OSError: if no caption can be written.
        """

    def finish(self) -> None:
        """Write the final file."""
        return

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        return


def one_line(text: str) -> str:
    """Return the text without tabs and line ends: a model may write any character."""
    return " ".join(text.split())


def path_in_one_line(path: str) -> str:
    r"""Return a path with each byte of a control character or line separator as `\xNN`, as `path_text` writes bytes."""
    return "".join(
        "".join(f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))
        if unicodedata.category(letter) in UNSAFE
        else letter
        for letter in path
    )


class Lines(Output):
    """A line on stdout for each image: its path, a tab, the text."""

    resumption = "a new call starts again; --out FILE or --format sidecar keep captions, and continue"

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        for _, row in rows:
            print(f"{path_in_one_line(row.path)}\t{one_line(row.caption)}", flush=True)
        self.added += len(rows)
        return []


def require_writable(folder: Path) -> None:
    """Raises: OSError: unless files can be written in a folder, which may have to be made."""
    for path in (folder, *folder.absolute().parents):
        if path.exists():
            try:
                with TemporaryFile(dir=path):
                    return
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(folder)) from None


@contextmanager
def errors_at(path: Path) -> Iterator[None]:
    """Name `path` in errors of writing, which name no file or one that no longer exists."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
