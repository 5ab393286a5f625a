"""The image files below a folder, and counts of what else is there."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from contracap.data.samples import IMAGE_SUFFIXES
from contracap.data.tar import SHARD_SUFFIXES
from contracap.files import special_kind
from contracap.formats import HEAD_BYTES, image_format
from contracap.wording import counted, escaped

logger = logging.getLogger(__name__)

# Files that are next to images on purpose: captions, tables, embeddings. They are neither opened nor counted.
COMPANIONS = (".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npy")
# Files that this package keeps next to what it writes. They are not counted either.
OURS = re.compile(r"\.contracap|.*\.partial(-journal)?$|\..*\.settings\.json$", re.DOTALL)


class SkippedFiles:
    """Counts of files and folders that were left out, by kind, such as `.mp4` or `named pipe(s)`."""

    def __init__(self) -> None:
        self.counts = Counter[str]()

    def __str__(self) -> str:
        """Return the counts in one line, the most frequent first; empty if nothing was left out."""
        return ", ".join(counted(count, escaped(kind)) for kind, count in self.counts.most_common())

    def add(self, file: Path) -> None:
        """Count what is not an image; a file under its suffix."""
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
            logger.warning(f"{escaped(str(where))}: skipped {self}")


def find_images(folder: Path, skipped: SkippedFiles | None = None) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders, relative to it, by name. A folder's own come first.

    Links to folders are followed once, unless they lead to a part of the folder itself or to a parent of it. Hidden
    files and folders are left out, as are subfolders that cannot be read and all that is not a regular file. `skipped`
    counts them; without it, one line is logged at the end.

    Raises: OSError: if the folder cannot be read.
    """
    counts = SkippedFiles() if skipped is None else skipped
    for file in find_files(folder, counts):
        if is_image(folder / file):
            yield file
        else:
            counts.add(folder / file)
    if skipped is None:
        counts.report(folder)


def has_image(folder: Path) -> bool:
    """Return whether an image is below a folder.

    Raises: OSError: if the folder cannot be read.
    """
    return next(find_images(folder, SkippedFiles()), None) is not None


def is_image(file: Path) -> bool:
    """Return whether a file is an image, by its name or, where the name says nothing, by its first bytes.

    TIFF's first bytes count only in a file without a suffix: raw files of cameras begin so, too.
    """
    suffix = file.suffix.lower()
    if suffix[1:] in IMAGE_SUFFIXES:
        return True
    if suffix in COMPANIONS or file.name.endswith(SHARD_SUFFIXES) or not os.path.isfile(file):
        return False
    try:
        with file.open("rb") as content:
            format = image_format(content.read(HEAD_BYTES))
    except OSError:
        return False
    return format is not None and (format != "TIFF" or not suffix)


def find_files(folder: Path, skipped: SkippedFiles) -> Iterator[Path]:
    """Yield the regular files in a folder and its subfolders, in the order of `find_images`."""
    for place, others in find_folders(folder, skipped):
        for name, kind in others:
            if kind == "file":
                yield place / name
            elif not OURS.match(name):
                skipped.counts[kind] += 1


def find_folders(folder: Path, skipped: SkippedFiles) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """Yield a folder and its subfolders, relative to it, each with the names and kinds of its other entries. `skipped`
    counts the subfolders that are left out."""
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
            skipped.counts["unreadable folder(s)"] += 1
            continue
        for entry in entries:
            kind, identity = _kind(entry, root)
            if identity is None:
                others.append((entry.name, kind))
            elif kind != "folder" or identity in seen:
                skipped.counts["folder(s) met before" if kind == "folder" else kind] += 1
            else:
                seen.add(identity)
                subfolders.append(place / entry.name)
        yield place, others
        waiting += reversed(subfolders)


def _kind(entry: os.DirEntry[str], root: str) -> tuple[str, tuple[int, int] | None]:
    """Return `file`, `folder`, or the kind an entry is skipped as; with the identity of a folder."""
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
    """Return whether a link leads to a part of the folder, which is met anyway, or to a parent of it."""
    target = os.path.realpath(link)
    return os.path.commonpath([root, target]) in (root, target)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
