"""Where captions go: lines on stdout, a text file beside each picture, or one file for all."""

import errno
import io
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np

from contracap.bulk.inputs import Item
from contracap.bulk.journal import Journal
from contracap.bulk.rows import Row
from contracap.bulk.tables import TableError, TableFormat, read_table, require_pyarrow, vectors_beside, write_table
from contracap.files import replacing

Existing = Literal["skip", "overwrite", "append"]
"""What becomes of a picture that has a caption: nothing; a new one in its place; one more, if it is another."""


class Output(ABC):
    """What all of them are: a context that keeps what was written, however it ends."""

    def check(self, item: Item) -> None:
        """Raises: ValueError, OSError: if there is no place for this picture's caption."""
        return

    def has(self, item: Item) -> bool:
        """Whether nothing is to be done for a picture. May be asked from another thread.

        Raises: ValueError: as `check`.
        """
        return False

    @abstractmethod
    def write(self, rows: Sequence[tuple[Item, Row]]) -> None:
        """Take in the captions of a batch.

        Raises: OSError: if they cannot be written.
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


class Lines(Output):
    """A line on stdout for each picture: its path, a tab, the text."""

    def write(self, rows: Sequence[tuple[Item, Row]]) -> None:
        for _, row in rows:
            path = " ".join(row.path.replace("\t", " ").splitlines())  # two blanks in a name stay two
            print(f"{path}\t{one_line(row.caption)}", flush=True)


class SideCars(Output):
    """A text file beside each picture, a line for each caption; its embedding in a `.npy` file, float32.

    Pictures whose names differ in their suffixes alone have one side-car between them: it is that of the first which is
    asked for, and there is no place for those that follow.

    Args:
        suffix: of the text file, such as ".txt".
    """

    def __init__(self, suffix: str, existing: Existing, *, embed: bool) -> None:
        self.suffix, self.existing, self.embed = suffix, existing, embed

    def __enter__(self) -> "SideCars":
        # A file of SQLite's own that is gone at the end: memory does not grow with the pictures, come as they may.
        self._pictures = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._pictures.execute("CREATE TABLE picture (side_car TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID")
        self._pictures.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()

    def check(self, item: Item) -> None:
        require_folder(self._place(item).parent)

    def has(self, item: Item) -> bool:
        place = self._place(item)
        self._take(place)
        return self.existing == "skip" and all(
            place.with_suffix(suffix).exists() for suffix in (self.suffix, *[".npy"] * self.embed)
        )

    def write(self, rows: Sequence[tuple[Item, Row]]) -> None:
        for item, row in rows:
            place = self._place(item)
            text, vector = place.with_suffix(self.suffix), place.with_suffix(".npy")
            if row.embedding is not None and (self.existing != "skip" or not vector.exists()):
                content = io.BytesIO()
                np.save(content, row.embedding)
                _write(vector, content.getvalue())
            line = one_line(row.caption).encode() + b"\n"
            before = text.read_bytes() if self.existing != "overwrite" and text.exists() else b""
            if not before:
                _write(text, line)
            elif self.existing == "append" and line.strip() not in map(bytes.strip, before.splitlines()):
                _write(text, before.rstrip(b"\r\n") + b"\n" + line)

    def _take(self, picture: Path) -> None:
        """Raises: ValueError: if the side-car of a picture is that of another one."""
        side_car = picture.with_suffix(self.suffix)
        key, name = os.fsencode(os.path.abspath(side_car)), os.fsencode(picture.name)
        try:
            self._pictures.execute("INSERT OR IGNORE INTO picture VALUES (?, ?)", (key, name))
            query = "SELECT name FROM picture WHERE side_car = ?"
            (first,) = self._pictures.execute(query, (key,)).fetchone()
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot keep in a temporary file which pictures have side-cars: {error}") from error
        if first != name:
            raise ValueError(
                f"{picture}: its side-car {side_car.name} is that of {os.fsdecode(first)}; rename one of them, or take "
                "--format jsonl, csv or parquet"
            )

    def _place(self, item: Item) -> Path:
        if not isinstance(item.source, Path):
            raise ValueError(
                f"{item.name}: no file can lie beside it; take --format jsonl, csv or parquet for shards and URLs"
            )
        return item.source


class Table(Output):
    """One file with a row for each caption. Until it is whole its rows are in `FILE.partial`, from which a run that was
    stopped goes on; rows of a file that is there are kept, unless it is to be overwritten.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if rows of other columns are there.
    """

    def __init__(self, path: Path, kind: TableFormat, existing: Existing, *, embed: bool) -> None:
        self.path, self.kind, self.existing, self.embed = path, kind, existing, embed
        if kind == "parquet":
            require_pyarrow()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        require_folder(path.parent)

    def __enter__(self) -> "Table":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        place = self.path.with_name(f"{self.path.name}.partial")
        self._journal = Journal(place)
        if self.existing == "overwrite" and not self._journal.is_new:
            self._journal.remove()
            self._journal = Journal(place)
        self._grown = not self._journal.is_new  # whether it has rows that the file lacks
        try:
            if self._journal.is_new and self.existing != "overwrite":
                if self.path.exists():
                    self._journal.add(read_table(self.path, self.kind))
                elif self.kind == "csv" and (beside := vectors_beside(self.path)).exists():
                    raise TableError(f"{beside} is there without {self.path.name}: give another --out, or --overwrite")
            first = next(iter(self._journal), None)
            if first is not None and (first.embedding is not None) != self.embed:
                has, option = ("no embeddings", "without") if self.embed else ("embeddings", "with")
                raise TableError(
                    f"{self.path} has {has} so far: go on {option} --embed, give another --out, or --overwrite"
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def check(self, item: Item) -> None:
        self._name(item)

    def has(self, item: Item) -> bool:
        name = self._name(item)
        return self.existing == "skip" and name in self._journal

    def write(self, rows: Sequence[tuple[Item, Row]]) -> None:
        self._grown = self._grown or bool(rows)  # first: whatever ends the next line may end it after a commit
        self._journal.add(replace(row, path=self._name(item)) for item, row in rows)

    def finish(self) -> None:
        first = next(iter(self._journal), None)
        if first is not None and self._grown:
            dimensions = None if first.embedding is None else len(first.embedding)
            with _naming(self.path):
                write_table(self.path, self.kind, self._journal, count=len(self._journal), dimensions=dimensions)
        self._grown = False

    def __exit__(self, *_: object) -> None:
        if not self._grown:
            self._journal.remove()
            return
        with suppress(OSError):  # of a full disk, say, which is known by now
            self._journal.commit()
        self._journal.close()

    def _name(self, item: Item) -> str:
        if self.kind != "metadata":
            return item.name
        if isinstance(item.source, Path):
            name = Path(os.path.relpath(item.name, self.path.parent))
            if name.parts[0] != os.pardir:
                return name.as_posix()
        raise ValueError(f"{item.name}: no file in the folder of {self.path}, where the names of its pictures start")


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
    """An error of writing, which names no file or one that is no more, becomes one on `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
