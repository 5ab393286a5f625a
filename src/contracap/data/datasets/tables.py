"""Tables with a row for each image or caption: CSV, TSV, JSON lines, JSON lists of objects, and Parquet."""

import ast
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from contracap.data.annotations import (
    Entry,
    Inside,
    Refused,
    SourceError,
    encoding_of,
    read_json,
    read_lines,
    refused_text,
)
from contracap.data.datasets.parquet import Embedded, column_names, parquet_rows
from contracap.data.shards import PICTURE_SUFFIXES, texts_in

# Usual names of columns, in the order of preference; upper and lower case are the same.
PICTURE_COLUMNS = (
    *("image", "image_path", "path", "file", "file_name", "filepath", "url"),
    *("filename", "image_name", "image_url", "jpg", "jpeg", "png", "webp"),
)
CAPTION_COLUMNS = ("caption", "text", "captions", "title", "raw", "sentences", "comment")

MISSING = ("NaN", "nan", "null", "None")  # in a cell of text, what pandas and others write where there is no value
DELIMITERS = ("\t", ",", ";", "|")
JSON_SUFFIXES = (".json", ".jsonl")
TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LIST = re.compile(rf"\[\s*{TEXT}(?:[\s,]+{TEXT})*[\s,]*\]", re.DOTALL)  # as Python and NumPy print them


def read_table(
    path: Path,
    *,
    picture_columns: Sequence[str] = PICTURE_COLUMNS,
    caption_columns: Sequence[str] = (),
    splits: Sequence[str] = (),
) -> Iterator[Entry | Refused]:
    """The rows of a table; the columns besides image and captions become fields. A row that cannot be used is
    refused.

    Args:
        caption_columns: names of columns, whose captions are all taken; none: the usual names.
        splits: those to take, of a table with the column `split`; none: all.

    Raises:
        SourceError: if the file is not what its suffix says, or lacks the columns or a split.
    """
    lacking, picture_column, groups = None, None, tuple[tuple[str, ...], ...]()
    missing = () if path.suffix.lower() in (".parquet", *JSON_SUFFIXES) else MISSING
    found = set[str]()
    for number, row in enumerate(_rows(path, picture_columns, caption_columns), 1):
        if isinstance(row, Refused):
            yield row
            continue
        source = f"{path.name}, row {number}"
        if splits and (split_column := column(row, ("split",))) is not None:
            found.add(str(row[split_column]))
            if str(row[split_column]) not in splits:
                continue
        elif splits:
            continue
        if picture_column not in row:
            picture_column = column(row, picture_columns) or picture_column
        groups = _caption_groups(tuple(row), tuple(caption_columns)) or groups
        if picture_column is None or not groups:
            lacking = lacking or _lacks(path, row, picture_columns, caption_columns)
            if path.suffix.lower() not in JSON_SUFFIXES:  # whose rows have each its own columns
                break
            yield Refused(source=source, kind="bad_row", message=f"its columns are {_listed(row)}")
            continue
        picture, captions = row.pop(picture_column, None), ()
        for group in groups:
            cells = [row.pop(name, None) for name in group]
            captions = tuple(text for cell in cells if cell not in missing for text in cell_captions(cell))
            if captions:
                break
        if isinstance(picture, dict) and picture.get("bytes") is None:  # as Hugging Face has images
            picture = picture.get("path")
        if isinstance(picture, Embedded):
            inside = Inside(str(path), picture_column, picture.row)
            yield Entry(picture=picture.name, captions=captions, fields=row, inside=inside)
        elif picture is None or picture == "":
            yield Refused(source=source, kind="no_picture", message=f"the column {picture_column} is empty")
        elif isinstance(picture, str):
            name = picture.strip() if "://" in picture else picture
            yield Entry(picture=name, captions=captions, fields=row)
        else:
            message = (
                f"the column {picture_column} holds {type(picture).__name__}, not paths or URLs; "
                "store the images as files, or name another column with --image-column"
            )
            yield Refused(source=source, kind="no_picture", message=message)
    if lacking is not None and (picture_column is None or not groups):
        raise lacking
    if absent := [split for split in splits if split not in found]:
        there = f"no row of the split {absent[0]}, but of {_listed(sorted(found)[:20])}" if found else "no column split"
        raise SourceError(f"{path} has {there}")


def cell_captions(value: Any) -> tuple[str, ...]:
    """The captions in a cell: a text, a list of texts, or a list that was written as a text, `["a", "b"]`."""
    if not isinstance(value, str) or not (value.strip()[:1] == "[" and value.strip()[-1:] == "]"):
        return texts_in(value)
    written = value.strip()
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        found = None
    if found is None and LIST.fullmatch(written):
        try:
            found = [ast.literal_eval(text) for text in re.findall(TEXT, written, re.DOTALL)]
        except (ValueError, SyntaxError):  # of an escape that Python does not know
            found = None
    if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
        return texts_in(found)
    return texts_in(value)


def column(names: Any, wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that there is."""
    there = {str(name).lower(): name for name in reversed(list(names))}
    return next((there[name.lower()] for name in wanted if name.lower() in there), None)


@lru_cache(maxsize=256)
def _caption_groups(names: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Columns whose captions belong together, the group to be preferred first: those wanted, if all are there; without
    a wish each usual name, with its numbered columns, such as `caption_0` and `caption1`."""
    if wanted:
        there = tuple(name for each in wanted if (name := column(names, (each,))) is not None)
        return (there,) if len(there) == len(wanted) else ()
    groups = []
    for usual in CAPTION_COLUMNS:
        numbered = [(int(found[1] or -1), name) for name in names if (found := _is_numbered(usual, name))]
        groups.append(tuple(name for _, name in sorted(numbered)))
    return tuple(filter(None, groups))


def _is_numbered(usual: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{usual}(?:[ _.-]?(\d{{1,9}}))?", name, re.IGNORECASE)


def is_table(document: Any) -> bool:
    """Whether JSON holds rows: a list of objects, or kohya's objects by the names of their images."""
    if isinstance(document, list):
        return any(isinstance(row, dict) for row in document)
    return isinstance(document, dict) and _is_kohya(document)


def _is_kohya(document: dict[str, Any]) -> bool:
    values = document.values()
    return bool(values) and all(isinstance(value, dict) and {"caption", "tags"} & set(value) for value in values)


def _lacks(path: Path, row: dict[str, Any], pictures: Sequence[str], captions: Sequence[str]) -> SourceError:
    wanted, remedy = pictures, "name the one with the images, --image-column"
    if column(row, pictures) is not None:
        wanted, remedy = captions or CAPTION_COLUMNS, "name those with captions, --caption-column NAME [NAME ...]"
    problem = f"{path} has no column {' or '.join(wanted)}, but {_listed(row)}"
    if path.suffix.lower() not in (".parquet", *JSON_SUFFIXES) and any(_names_image(name) for name in row):
        return SourceError(f"{problem}: write the names of the columns into a line above the first row")
    return SourceError(f"{problem}: {remedy}")


def _listed(names: Any) -> str:
    return ", ".join(f"{name!r:.60}" for name in names)


def _names_image(cell: Any) -> bool:
    cell = str(cell).strip().lower()
    stem, _, suffix = cell.rpartition(".")
    return cell.startswith(("http://", "https://")) or (bool(stem) and suffix in PICTURE_SUFFIXES)


def _rows(path: Path, pictures: Sequence[str], captions: Sequence[str]) -> Iterator[dict[str, Any] | Refused]:
    match path.suffix.lower():
        case ".parquet":
            return parquet_rows(path, column(column_names(path), pictures))
        case ".json" if not is_lines(path):
            return _document_rows(read_json(path))
        case ".json" | ".jsonl":
            return _json_rows(path)
        case _:
            return _csv_rows(path, (*pictures, *(captions or CAPTION_COLUMNS)))


def is_lines(path: Path) -> bool:
    """Whether a JSON file has an object on its first line, and more lines: JSON lines under another suffix."""
    lines = (line for _, line in read_lines(path) if isinstance(line, Refused) or line.strip())
    first, second = next(lines, None), next(lines, None)
    try:
        return second is not None and isinstance(first, str) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _document_rows(document: Any) -> Iterator[dict[str, Any] | Refused]:
    if isinstance(document, dict) and _is_kohya(document):
        document = [{"image": name, "caption": row.get("tags"), **row} for name, row in document.items()]
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if isinstance(row, dict):
            yield row
        else:
            yield Refused(source=f"row {number}", kind="bad_row", message="not a JSON object")


def _json_rows(path: Path) -> Iterator[dict[str, Any] | Refused]:
    for number, line in read_lines(path):
        if isinstance(line, Refused):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            message = "not a JSON object"
            source = f"{path.name}, line {number}"
            yield row if isinstance(row, dict) else Refused(source=source, kind="bad_row", message=message)


def _csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any] | Refused]:
    """The rows under the first line that is not blank, whose names say by what the cells are separated."""
    try:
        with path.open(encoding=encoding_of(path), errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            while (head := lines.take()) is not None and (not head.strip() or head.lower().startswith("sep=")):
                pass  # Excel's word on the separator
            if head is None:
                return
            delimiter = _delimiter(head, wanted, first="\t" if path.suffix.lower() == ".tsv" else ",")
            names = [name.strip() for name in _cells(head, delimiter)]
            while True:
                source = f"{path.name}, line {lines.number + 1}"
                record, cells = _record(lines, delimiter, len(names))
                if not record:
                    return
                if isinstance(cells, list) and not any(map(str.strip, cells[len(names) :])):
                    cells = cells[: len(names)]
                if refused := refused_text(source, record):
                    yield refused
                elif isinstance(cells, csv.Error):
                    yield Refused(source=source, kind="bad_row", message=f"a stray quote: {cells}")
                elif len(cells) == len(names):
                    yield dict(zip(names, map(str.strip, cells), strict=True))
                elif record.strip():  # most likely a caption with a delimiter and without quotes, which would be cut
                    message = f"{len(cells)} cells under {len(names)} columns, separated by {delimiter!r}"
                    yield Refused(source=source, kind="bad_row", message=message)
    except (UnicodeError, csv.Error) as error:
        raise SourceError(f"{path} is not a table of text: {error}") from None


@dataclass
class _Lines:
    """The lines of a file, some of which may be put back. `number`: of those that were taken."""

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
    """What separates most of the names that are known, else most names; of equals, the one that the suffix says."""
    names = {name.lower() for name in wanted}

    def rank(delimiter: str) -> tuple[int, int, bool]:
        try:
            cells = _cells(head, delimiter)
        except csv.Error:
            return 0, 0, False
        return sum(cell.strip().lower() in names for cell in cells), len(cells), delimiter == first

    return max(DELIMITERS, key=rank)


def _record(lines: _Lines, delimiter: str, width: int) -> tuple[str, list[str] | csv.Error]:
    """The next row as it stands there and its cells, which quotes may carry over several lines; or why it has none.

    A quote that is never closed is an error of its own line: the lines after it are rows again, as is one that looks
    like a row while a quote is open.
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
    """Whether a line within quotes looks like a row: so many cells, an image in one of them, no end of the quotes."""
    if line.count('"') % 2:
        return False
    try:
        cells = _cells(line, delimiter)
    except csv.Error:
        return False
    return len(cells) == width and any(map(_names_image, cells))


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a line by itself. Between tabs, quotes are text."""
    line = line.rstrip("\r\n")
    if '"' not in line or delimiter == "\t":
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
