"""Find the images below a folder, and count what else lies there."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from contracap.data.shards import PICTURE_SUFFIXES, SHARD_SUFFIXES
from contracap.files import special_kind
from contracap.formats import HEAD_BYTES, image_format
from contracap.wording import counted, escaped

logger = logging.getLogger(__name__)

# Files that lie beside images on purpose: captions, tables, embeddings. They are neither opened nor counted.
COMPANIONS = (".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npy")
# Files that this package keeps next to what it writes. They are not counted either.
OURS = re.compile(r"\.contracap|.*\.partial(-journal)?$|\..*\.settings\.json$", re.DOTALL)


class PassedOver:
    """Counts of what was left out of folders, by kind, such as `.mp4` or `named pipe(s)`."""

    def __init__(self) -> None:
        self.counts = Counter[str]()

    def __str__(self) -> str:
        """Return the counts in one line, the most frequent first; empty if nothing was left out."""
        return ", ".join(counted(count, escaped(kind)) for kind, count in self.counts.most_common())

    def add(self, file: Path) -> None:
        """Count what is not an image, a file under its suffix."""
        if os.path.isdir(file):
            self.counts["folder(s)"] += 1
        elif not os.path.exists(file):
            self.counts["broken link(s)"] += 1
        elif not os.path.isfile(file):
            self.counts[f"{special_kind(file.stat().st_mode)}(s)"] += 1
        elif not file.name.lower().endswith(COMPANIONS) and not OURS.match(file.name):
            self.counts[file.suffix.lower() or "file(s) without suffix"] += 1

    def report(self, where: str | Path) -> None:
        """Log the line, if there is anything to tell."""
        if self.counts:
            logger.warning(f"{escaped(str(where))}: passed over {self}")


def pictures_in(folder: Path, passed: PassedOver | None = None) -> Iterator[Path]:
    """The images in a folder and its subfolders, relative to it, by name; a folder's own come before its subfolders'.

    Links to folders are followed once, unless they lead to a part of the folder itself or to what holds it. Hidden
    files and folders are left out, as are subfolders that cannot be read and all that is not a regular file. `passed`
    counts them; without it, one line is logged at the end.

    Raises: OSError: if the folder cannot be read.
    """
    counts = PassedOver() if passed is None else passed
    for file in files_in(folder, counts):
        if is_picture(folder / file):
            yield file
        else:
            counts.add(folder / file)
    if passed is None:
        counts.report(folder)


def has_picture(folder: Path) -> bool:
    """Whether an image lies below a folder.

    Raises: OSError: if the folder cannot be read.
    """
    return next(pictures_in(folder, PassedOver()), None) is not None


def is_picture(file: Path) -> bool:
    """Whether a file's name says so or, where the name says nothing, its first bytes.

    TIFF's are not enough under a suffix of its own: raw files of cameras begin so, too.
    """
    suffix = file.suffix.lower()
    if suffix[1:] in PICTURE_SUFFIXES:
        return True
    if suffix in COMPANIONS or file.name.endswith(SHARD_SUFFIXES) or not os.path.isfile(file):
        return False
    try:
        with file.open("rb") as opened:
            format = image_format(opened.read(HEAD_BYTES))
    except OSError:
        return False
    return format is not None and (format != "TIFF" or not suffix)


def files_in(folder: Path, passed: PassedOver) -> Iterator[Path]:
    """The regular files in a folder and its subfolders, as `pictures_in` orders them."""
    for place, others in folders_in(folder, passed):
        for name, kind in others:
            if kind == "file":
                yield place / name
            elif not OURS.match(name):
                passed.counts[kind] += 1


def folders_in(folder: Path, passed: PassedOver) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """A folder and its subfolders, relative to it, each with the names and kinds of what else it holds. `passed` counts
    the subfolders that are left out."""
    root = os.path.realpath(folder)
    seen = {_identity(root)}
    waiting = [Path()]
    while waiting:
        place = waiting.pop()
        subfolders, others = list[Path](), list[tuple[str, str]]()
        try:
            with os.scandir(folder / place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            if not place.parts:
                raise
            passed.counts["unreadable folder(s)"] += 1
            continue
        for entry in entries:
            kind, identity = _kind(entry, root)
            if identity is None:
                others.append((entry.name, kind))
            elif kind != "folder" or identity in seen:
                passed.counts["folder(s) met before" if kind == "folder" else kind] += 1
            else:
                seen.add(identity)
                subfolders.append(place / entry.name)
        yield place, others
        waiting += reversed(subfolders)


def _kind(entry: os.DirEntry[str], root: str) -> tuple[str, tuple[int, int] | None]:
    """`file`, `folder`, or what it is passed over as; with the identity of a folder."""
    if entry.name.startswith("."):
        return "hidden file(s) or folder(s)", None
    try:
        if entry.is_file():
            return "file", None
        if entry.is_dir():
            back = entry.is_symlink() and _leads_back(entry.path, root)
            return "link(s) to a folder that is already read" if back else "folder", _identity(entry.path)
        return f"{special_kind(entry.stat().st_mode)}(s)", None
    except OSError:  # a link in a circle, or to what is gone
        return "broken link(s)", None


def _leads_back(link: str, root: str) -> bool:
    """Whether a link leads to a part of the folder, which is met anyway, or to what holds it."""
    target = os.path.realpath(link)
    return os.path.commonpath([root, target]) in (root, target)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
