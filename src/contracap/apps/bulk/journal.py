"""The rows of an output that is not finished yet, safe from any end of the process.

A SQLite file: a row is in it whole or not at all, it is found by its name without all names in memory, and it is there
after a `kill -9`.
"""

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from contracap.apps.bulk.rows import Row

COMMIT_SECONDS = 1.0  # a process that is killed loses no more than these, and the batch at work
TABLE = "CREATE TABLE row (path TEXT, caption TEXT, score REAL, embedding BLOB, UNIQUE (path, caption))"


class Journal:
    """Rows in the order in which they came, none of them twice. For one process at a time, and its threads.

    Raises: OSError: naming the file, if it cannot be written, is none of ours, or another process has it.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: None is a file that has no name, and is gone at the end."""
        self.path = path
        self._lock = threading.Lock()
        self._committed = -COMMIT_SECONDS
        with self._errors():
            self._database = sqlite3.connect(path or "", timeout=0, isolation_level=None, check_same_thread=False)
            try:
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._database.execute("BEGIN EXCLUSIVE")
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                self.is_new = version == 0
                if self.is_new:
                    self._database.execute(TABLE)
                    self._database.execute("PRAGMA user_version = 1")
            except BaseException:
                self._database.close()
                raise

    def __len__(self) -> int:
        with self._errors():
            return self._database.execute("SELECT count(*) FROM row").fetchone()[0]

    def number(self, path: str) -> int:
        """The number, from 1, of the last row with a caption of an image; 0 if there is none. A blank one is none."""
        query = "SELECT coalesce(max(rowid), 0) FROM row WHERE path = ? AND caption != ''"
        with self._errors():
            return self._database.execute(query, (path,)).fetchone()[0]

    def last_number(self) -> int:
        """The number of the last row."""
        with self._errors():
            return self._database.execute("SELECT coalesce(max(rowid), 0) FROM row").fetchone()[0]

    def __iter__(self) -> Iterator[Row]:
        with self._errors():
            cursor = self._database.execute("SELECT path, caption, score, embedding FROM row ORDER BY rowid")
        while True:
            with self._errors():
                values = cursor.fetchone()
            if values is None:
                return
            path, caption, score, embedding = values
            vector = None if embedding is None else np.frombuffer(embedding, dtype=np.float32)
            yield Row(path=path, caption=caption, score=score, embedding=vector)

    def add(self, rows: Iterable[Row]) -> list[Row]:
        """Take rows in, but for those that are there, and in place of those without a caption; return the former."""
        there = list[Row]()
        for row in rows:
            caption = row.caption if row.caption.strip() else ""
            values = (row.path, caption, row.score, None if row.embedding is None else row.embedding.tobytes())
            with self._errors():
                self._database.execute("DELETE FROM row WHERE path = ? AND caption = ''", (row.path,))
                if not self._database.execute("INSERT OR IGNORE INTO row VALUES (?, ?, ?, ?)", values).rowcount:
                    there.append(row)
        if time.monotonic() > self._committed + COMMIT_SECONDS:
            self.commit()
        return there

    def commit(self) -> None:
        """Have on disk all that was added."""
        with self._errors():
            self._database.execute("COMMIT")
            self._database.execute("BEGIN EXCLUSIVE")
        self._committed = time.monotonic()

    def close(self) -> None:
        """Keep what was committed; the rest is forgotten."""
        self._database.close()

    def remove(self) -> None:
        """Close it and delete the file."""
        self.close()
        for suffix in ("", "-journal") if self.path else ():
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """One thread at a time, and SQLite's complaints as those of the system."""
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                codes = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}
                number = codes.get(getattr(error, "sqlite_errorcode", 0))
                if number is not None:
                    raise OSError(number, os.strerror(number), str(self.path)) from error
                if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
                    raise OSError(f"{self.path}: another process is writing it") from error
                raise OSError(f"{self.path} cannot be used: {error}; delete it to start again") from error
