"""Rows of CSV and TSV files, whose separators and quotes are often wrong."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracap.data.annotations import SkippedEntry, SourceError, bad_row, broken_text, encoding_of
from contracap.data.samples import IMAGE_SUFFIXES

DELIMITERS = ("\t", ",", ";", "|")


def csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any] | SkippedEntry]:
    """Yield the rows below the first line that is not blank, which names the columns.

    Args:
        wanted: usual names of columns; they tell the separator.
    """
    try:
        with path.open(encoding=encoding_of(path), errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            while (head := lines.take()) is not None and (not head.strip() or head.lower().startswith("sep=")):
                pass  # Excel names the separator so
            if head is None:
                return
            delimiter = _delimiter(head, wanted, first="\t" if path.suffix.lower() == ".tsv" else ",")
            names = [name.strip() for name in _cells(head, delimiter)]
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise SourceError(f"{path} has two columns called {twice!r}: give each column a name of its own")
            while True:
                source = f"{path.name}, line {lines.number + 1}"
                text, cells = _take_row(lines, delimiter, len(names))
                if not text:
                    return
                if isinstance(cells, list) and not any(map(str.strip, cells[len(names) :])):
                    cells = cells[: len(names)]
                if skipped := broken_text(source, text):
                    yield skipped
                elif isinstance(cells, csv.Error):
                    yield bad_row(source, f"a stray quote: {cells}")
                elif len(cells) == len(names):
                    yield dict(zip(names, map(str.strip, cells), strict=True))
                elif text.strip():  # most likely a caption with a delimiter and without quotes, which would be cut
                    yield bad_row(source, f"{len(cells)} cells under {len(names)} columns, separated by {delimiter!r}")
    except (UnicodeError, csv.Error) as error:
        raise SourceError(f"{path} is not a table of text: {error}") from None


@dataclass
class _Lines:
    """The lines of a file, which may be put back. `number` counts those that were taken."""

    file: Iterator[str]
    number: int = 0
    back: list[str] = field(default_factory=list)

    def take(self) -> str | None:
        line = self.back.pop() if self.back else next(self.file, None)
        self.number += line is not None
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        self.back.extend(reversed(lines))
        self.number -= len(lines)


def _delimiter(head: str, wanted: Sequence[str], first: str) -> str:
    """Return what separates most of the usual names, else most names, else `first`, the one that the suffix says."""
    names = {name.lower() for name in wanted}

    def rank(delimiter: str) -> tuple[int, int, bool]:
        try:
            cells = _cells(head, delimiter)
        except csv.Error:
            return 0, 0, False
        return sum(cell.strip().lower() in names for cell in cells), len(cells), delimiter == first

    return max(DELIMITERS, key=rank)


def _take_row(lines: _Lines, delimiter: str, width: int) -> tuple[str, list[str] | csv.Error]:
    """Return the text of the next row and its cells, or why it has none. Quotes may carry a row over several lines.

    A quote that is never closed is an error of its own line: the lines after it are rows again. So is a line that
    looks like a row while a quote is open.
    """
    first = lines.take() or ""
    if '"' not in first or delimiter == "\t":
        return first, _cells(first, delimiter)
    taken = [first]

    def feed() -> Iterator[str]:
        yield first
        while (line := lines.take()) is not None:
            if _is_row(line, delimiter, width):
                lines.put_back([line])
                return
            taken.append(line)
            yield line

    try:
        cells = next(csv.reader(feed(), delimiter=delimiter, strict=True, skipinitialspace=True), [])
    except csv.Error as error:
        lines.put_back(taken[1:])
        return first, error
    return "".join(taken), cells


def _is_row(line: str, delimiter: str, width: int) -> bool:
    """Return whether a line within quotes has no odd quote, and `width` cells, one of which names an image."""
    if line.count('"') % 2:
        return False
    try:
        cells = _cells(line, delimiter)
    except csv.Error:
        return False
    return len(cells) == width and any(map(names_image, cells))


def _cells(line: str, delimiter: str) -> list[str]:
    """Split a line by itself. Between tabs, quotes are text."""
    line = line.rstrip("\r\n")
    if '"' not in line or delimiter == "\t":
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def names_image(cell: Any) -> bool:
    """Return whether a cell looks like the URL or the file name of an image."""
    cell = str(cell).strip().lower()
    stem, _, suffix = cell.rpartition(".")
    return cell.startswith(("http://", "https://")) or (bool(stem) and suffix in IMAGE_SUFFIXES)
