"""Captions as rows of one file."""

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.journal import Journal
from contracap.apps.bulk.output_config import ConfigFile, OutputConfig
from contracap.apps.bulk.outputs import Existing, Output, errors_at, require_writable
from contracap.apps.bulk.rows import Row
from contracap.apps.bulk.table_files import (
    TableError,
    TableFormat,
    read_rows,
    vectors_beside,
    write_table,
)
from contracap.extras import require_extra
from contracap.files import is_stream, path_text

MAX_NAME_BYTES = 255 - len(".partial-journal")  # of an output with files of ours next to it; SQLite makes the journal


class Table(Output):
    """One file with a row for each caption.

    Rows are first collected in `FILE.partial`, from which the same command continues. Existing rows are kept unless
    `existing` is "overwrite". An image whose caption is blank has none. A file that is not regular, such as
    /dev/stdout, is never read.

    Args:
        config: settings that decide the captions, kept in a hidden file next to it; None: rows of any settings may mix.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if rows of other columns or settings are there.
    """

    def __init__(
        self, path: Path, kind: TableFormat, existing: Existing, *, embed: bool, config: OutputConfig | None = None
    ) -> None:
        self.path, self.kind, self.existing, self.embed, self.config = path, kind, existing, embed, config
        self.place = str(path)
        self._config_file: ConfigFile | None = None
        self._last_before = 0  # number of the last row that was there before
        self._is_stream = is_stream(path)
        if kind == "parquet":
            require_extra("data", "pyarrow")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not self._is_stream:
            require_writable(path.parent)
        elif kind == "csv" and embed:
            raise ValueError(f"{path} has no file next to it for embeddings, as csv needs: take jsonl, or a file")
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
            if self.config is not None:
                self._config_file = ConfigFile(_beside(self.path, ".settings.json", hidden=True), self.config)
                if self.existing == "skip" and (self.path.exists() or not self._journal.is_new):
                    remedy = "Give another --out, --append for one more caption each, or --overwrite to start again"
                    self._config_file.check(str(self.path), remedy)
            if self._journal.is_new and self.existing != "overwrite":
                if self.path.exists():
                    self._journal.add(read_rows(self.path, self.kind))
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
        number = self._journal.number(self._stored_name(item)) if self.existing == "skip" else 0
        self.repeated += number > self._last_before
        return number > 0

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        if self._config_file is not None and rows:  # the captions are of these settings from now on
            self._config_file.write()
            self._config_file = None
        self._grown = self._grown or bool(rows)  # first: what interrupts the next line may do so after a commit
        there = self._journal.add(replace(row, path=self._stored_name(item)) for item, row in rows)
        self.added += len(rows) - len(there)
        self.repeated += sum(self._journal.number(row.path) > self._last_before for row in there)
        return []

    def finish(self) -> None:
        first = next(iter(self._journal), None)
        if first is not None and self._grown:
            dimensions = None if first.embedding is None else len(first.embedding)
            with errors_at(self.path):
                write_table(self.path, self.kind, self._journal, count=len(self._journal), dimensions=dimensions)
        self._grown = False

    def __exit__(self, *_: object) -> None:
        if not self._grown or self._is_stream:
            self._journal.remove()
            return
        with suppress(OSError):  # of a full disk, say, which is known by now
            self._journal.commit()
        self._journal.close()

    def _stored_name(self, item: Item) -> str:
        """Return the name of an image as its row has it: a file may be named from the root or the working folder."""
        names = [self._name(item)]
        if isinstance(item.source, Path) and self.kind != "metadata":
            names += [path_text(os.path.abspath(item.source)), path_text(os.path.relpath(item.source))]
        return next(filter(self._journal.number, names), names[0])

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
