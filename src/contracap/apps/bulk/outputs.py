"""Where captions go: lines on stdout, a text file beside each image, or one file for all."""

import errno
import hashlib
import io
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np

from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.journal import Journal
from contracap.apps.bulk.rows import Row
from contracap.apps.bulk.settings import Record, Settings, SettingsError
from contracap.apps.bulk.tables import TableError, TableFormat, read_table, require_pyarrow, vectors_beside, write_table
from contracap.files import is_stream, path_text, replacing
from contracap.wording import escaped

Existing = Literal["skip", "overwrite", "append"]
"""What becomes of an image that has a caption: nothing; a new one in its place; one more, if it is another."""


MAX_NAME_BYTES = 255 - len(".partial-journal")  # of an output with files of ours next to it; SQLite makes the journal

OF_ONE_IMAGE = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
}


def is_of_one_image(error: OSError | ValueError) -> bool:
    """Whether an error is one of a name or of its folder. Any other, as of a full disk, will be the next one's, too."""
    if isinstance(error, ValueError):
        return not isinstance(error, SettingsError)
    return error.errno in OF_ONE_IMAGE


class Output(ABC):
    """Where captions go: a context that keeps what was written, however it ends.

    Attributes:
        added: captions that the output did not have.
        repeated: images that came before in the same run.
        resumption: what the user can do after an interruption.
    """

    added = repeated = 0
    resumption = "the same command continues"

    def check(self, item: Item) -> None:
        """Raises: ValueError, OSError: if there is no place for this image's caption."""
        return

    def has(self, item: Item) -> bool:
        """Whether nothing is to be done for an image. May be asked from another thread.

        Raises: ValueError, OSError: as `check`.
        """
        return False

    @abstractmethod
    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        """Take in the captions of a batch; return why some of its images have none.

        Raises: OSError: if no caption can be written.
        """

    def finish(self) -> None:
        """Make of it what the user asked for, now that all is written."""
        return

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        return


def one_line(text: str) -> str:
    """The text without tabs and whatever else ends a line: a model may write any character."""
    return " ".join(text.split())


def path_in_one_line(path: str) -> str:
    """The path without tabs and line breaks, and with control characters escaped; two blanks in a name stay two."""
    return escaped(" ".join(path.replace("\t", " ").splitlines()))


class Lines(Output):
    """A line on stdout for each image: its path, a tab, the text."""

    resumption = "a new call starts again; --out FILE or --format sidecar keep captions, and continue"

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        for _, row in rows:
            print(f"{path_in_one_line(row.path)}\t{one_line(row.caption)}", flush=True)
        self.added += len(rows)
        return []


class SideCars(Output):
    """A text file beside each image, a line for each caption; its embedding in a `.npy` file, float32. One that is
    empty or blank counts as none.

    Images whose names differ in their suffixes alone have one side-car between them: it is that of the first which has
    a caption, and there is no place for those that follow.

    Args:
        suffix: of the text file, such as ".txt".
        roots: the folders that images are taken from.
        folder: where the side-cars lie, if not beside the images; below it as the images below their root.
        settings: what decides the captions, kept in a hidden file of each folder with side-cars; None: those of any
            may lie together.
    """

    def __init__(
        self,
        suffix: str,
        existing: Existing,
        *,
        embed: bool,
        roots: Sequence[Path] = (),
        folder: Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.suffix, self.existing, self.embed = suffix, existing, embed
        self._roots, self._folder = [Path(os.path.abspath(root)) for root in roots], folder
        self.settings, self._records = settings, dict[Path, Record | None]()  # None: they are written
        self._origins = dict[bytes, str]()  # of side-cars, by a digest: about 100 bytes an image
        self._lock = threading.Lock()  # images are looked for in one thread, and captions written in another
        if existing == "overwrite":
            self.resumption = "the same command starts again"
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            require_folder(folder)

    def check(self, item: Item) -> None:
        require_folder(self._place(item).parent)

    def has(self, item: Item) -> bool:
        place = self._place(item)
        self._require_settings(place.parent)
        vector = place.with_suffix(".npy")
        has_vector = not self.embed or (vector.is_file() and vector.stat().st_size > 0)
        captions = _captions(text := place.with_suffix(self.suffix))
        if self.existing == "append" and not _is_utf8(captions):
            raise ValueError(
                f"{text} is not UTF-8, so no line can be added: save it as UTF-8, or give --overwrite or another --ext"
            )
        is_done = bool(captions) and self.existing == "skip" and has_vector
        if is_done:
            self._take(place, self._source(item))
        return is_done

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        broken = list[Exception]()
        for item, row in rows:
            try:
                place = self._place(item)
                if self._take(place, self._source(item)):
                    self._write_one(place, row)
            except (OSError, ValueError) as error:
                if not is_of_one_image(error):
                    raise
                broken.append(error)
                continue
            if (record := self._records.get(place.parent)) is not None:
                record.write()  # what lies there is of these settings from now on
                self._records[place.parent] = None
        return broken

    def _write_one(self, place: Path, row: Row) -> None:
        text, vector = place.with_suffix(self.suffix), place.with_suffix(".npy")
        if row.embedding is not None and (self.existing != "skip" or not vector.exists()):
            content = io.BytesIO()
            np.save(content, row.embedding)
            _write(vector, content.getvalue())
        line = one_line(row.caption).encode() + b"\n"
        before = _captions(text) if self.existing != "overwrite" else b""
        if not before:
            _write(text, line)
        elif self.existing == "append" and line.strip() not in map(bytes.strip, before.splitlines()):
            _write(text, before.rstrip(b"\r\n") + b"\n" + line)
        else:
            return
        self.added += 1

    def _require_settings(self, folder: Path) -> None:
        """Raises: SettingsError: if the side-cars of a folder are of other settings, and would be added to."""
        if self.settings is None or folder in self._records:
            return
        record = Record(folder / f".contracap{self.suffix}.json", self.settings)
        if self.existing == "skip":
            remedy = "Give --append for one more caption each, --overwrite to start again, or another --ext or --out"
            record.check(str(folder), remedy)
        self._records[folder] = record

    def _take(self, place: Path, image: Path) -> bool:
        """Give the image its side-car, unless it came before in this run; return whether it did not.

        Raises: ValueError: if the side-car is that of another image.
        """
        side_car, source = (Path(os.path.abspath(path)) for path in (place.with_suffix(self.suffix), image))
        digest = hashlib.blake2b(os.fsencode(side_car), digest_size=16).digest()
        # The image but for its stem, which is the side-car's: all images of a folder share this string.
        origin = sys.intern(str(source.with_name(f"*{source.suffix}")))
        with self._lock:
            is_new = digest not in self._origins
            first = Path(self._origins.setdefault(digest, origin))
            self.repeated += not is_new and first == Path(origin)
        if first != Path(origin):
            other = first.with_name(f"{source.stem}{first.suffix}")
            shown = other.name if other.parent == source.parent else other
            raise ValueError(
                f"{image}: {shown} has the same side-car, {side_car.name}: rename one of them, or take "
                "--format jsonl, csv or parquet"
            )
        return is_new

    def _source(self, item: Item) -> Path:
        if not isinstance(item.source, Path):
            raise ValueError(
                f"{item.name}: no file can lie beside it; take --format jsonl, csv or parquet for shards and URLs"
            )
        return item.source

    def _place(self, item: Item) -> Path:
        """Where the side-car lies, but for its suffix."""
        source = self._source(item)
        if self._folder is None:
            return source
        whole = Path(os.path.abspath(source))
        root = next((root for root in self._roots if whole.is_relative_to(root)), whole.parent)
        return self._folder / whole.relative_to(root)


def _captions(side_car: Path) -> bytes:
    """What a side-car holds; nothing if there is none, or if it is blank.

    Raises: ValueError: if it is not a file. OSError: if it cannot be read.
    """
    if not side_car.exists():
        return b""
    if not side_car.is_file():
        raise ValueError(f"{side_car} is not a file, so no caption can be there: rename it, or take another --ext")
    content = side_car.read_bytes()
    return content if content.decode(errors="replace").strip("\ufeff\0 \t\r\n\f\v").strip() else b""


def _is_utf8(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()  # of ASCII letters in UTF-16 every other byte is zero
    except ValueError:
        return False


class Table(Output):
    """One file with a row for each caption. Until it is whole its rows are in `FILE.partial`, from which the same
    command continues; rows of a file that is there are kept, unless it is to be overwritten. An image whose caption is
    blank has none. What is not a regular file, such as /dev/stdout, is never read.

    Args:
        settings: what decides the captions, kept in a hidden file beside; None: rows of any may lie together.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if rows of other columns or settings are there.
    """

    def __init__(
        self, path: Path, kind: TableFormat, existing: Existing, *, embed: bool, settings: Settings | None = None
    ) -> None:
        self.path, self.kind, self.existing, self.embed, self.settings = path, kind, existing, embed, settings
        self._record: Record | None = None
        self._last_before = 0  # number of the last row that was there before
        self._is_stream = is_stream(path)
        if kind == "parquet":
            require_pyarrow()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not self._is_stream:
            require_folder(path.parent)
        elif kind == "csv" and embed:
            raise ValueError(f"{path} has no file beside it for embeddings, as csv needs: take jsonl, or a file")
        if self._is_stream:
            self.resumption = "the same command starts again"
        elif existing == "overwrite":
            self.resumption = "the same command without --overwrite continues"

    def __enter__(self) -> "Table":
        if self._is_stream:  # a device or a pipe holds no captions to continue from
            self._journal = Journal(None)
            self._grown = False
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        place = _beside(self.path, ".partial")
        self._journal = Journal(place)
        if self.existing == "overwrite" and not self._journal.is_new:
            self._journal.remove()
            self._journal = Journal(place)
        self._grown = not self._journal.is_new  # whether it has rows that the file lacks
        try:
            if self.settings is not None:
                self._record = Record(_beside(self.path, ".settings.json", hidden=True), self.settings)
                if self.existing == "skip" and (self.path.exists() or not self._journal.is_new):
                    remedy = "Give another --out, --append for one more caption each, or --overwrite to start again"
                    self._record.check(str(self.path), remedy)
            if self._journal.is_new and self.existing != "overwrite":
                if self.path.exists():
                    self._journal.add(read_table(self.path, self.kind))
                elif self.kind == "csv" and os.path.exists(beside := vectors_beside(self.path)):
                    raise TableError(f"{beside} is there without {self.path.name}: give another --out, or --overwrite")
            self._last_before = self._journal.last_number()
            first = next(iter(self._journal), None)
            if first is not None and (first.embedding is not None) != self.embed:
                has, option = ("no embeddings", "without") if self.embed else ("embeddings", "with")
                raise TableError(
                    f"{self.path} has {has} so far: continue {option} --embed, give another --out, or --overwrite"
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def check(self, item: Item) -> None:
        self._name(item)

    def has(self, item: Item) -> bool:
        number = self._journal.number(self._name(item)) if self.existing == "skip" else 0
        self.repeated += number > self._last_before
        return number > 0

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        if self._record is not None and rows:  # the captions are of these settings from now on
            self._record.write()
            self._record = None
        self._grown = self._grown or bool(rows)  # first: whatever ends the next line may end it after a commit
        there = self._journal.add(replace(row, path=self._name(item)) for item, row in rows)
        self.added += len(rows) - len(there)
        self.repeated += sum(self._journal.number(row.path) > self._last_before for row in there)
        return []

    def finish(self) -> None:
        first = next(iter(self._journal), None)
        if first is not None and self._grown:
            dimensions = None if first.embedding is None else len(first.embedding)
            with _naming(self.path):
                write_table(self.path, self.kind, self._journal, count=len(self._journal), dimensions=dimensions)
        self._grown = False

    def __exit__(self, *_: object) -> None:
        if not self._grown or self._is_stream:
            self._journal.remove()
            return
        with suppress(OSError):  # of a full disk, say, which is known by now
            self._journal.commit()
        self._journal.close()

    def _name(self, item: Item) -> str:
        if self.kind != "metadata":
            return item.name
        if isinstance(item.source, Path):
            name = Path(os.path.relpath(item.source, self.path.parent))
            if name.parts[0] != os.pardir:
                return path_text(name.as_posix())
        raise ValueError(f"{item.name}: no file in the folder of {self.path}, where the names of its images start")


def _beside(path: Path, suffix: str, *, hidden: bool = False) -> Path:
    """A file of ours next to an output, called after it; where that name would be too long, after its digest."""
    name = os.fsencode(path.name)
    if len(name) > MAX_NAME_BYTES:
        return path.with_name(f".contracap-{hashlib.sha256(name).hexdigest()[:16]}{suffix}")
    return path.with_name(f"{'.' * hidden}{path.name}{suffix}")


def require_folder(folder: Path) -> None:
    """Raises: OSError: unless files can be written in a folder, which may have to be made."""
    for path in (folder, *folder.absolute().parents):
        if path.exists():
            try:
                with TemporaryFile(dir=path):
                    return
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(folder)) from None


def _write(path: Path, content: bytes) -> None:
    with _naming(path), replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of writing, which names no file or one that no longer exists, becomes one on `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
