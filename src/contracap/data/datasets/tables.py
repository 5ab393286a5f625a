"""Tables with a row for each image or caption: CSV, TSV, JSON lines, JSON lists of objects, and Parquet."""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from contracap.data.annotations import Entry, Inside, SkippedEntry, SourceError, bad_row, read_json, read_lines
from contracap.data.datasets.csv import csv_rows, names_image
from contracap.data.datasets.parquet import Embedded, column_names, parquet_rows
from contracap.data.samples import texts_in

# Usual names of columns, in the order of preference; upper and lower case are the same.
IMAGE_COLUMNS = (
    *("image", "image_path", "path", "file", "file_name", "filepath", "url"),
    *("filename", "image_name", "image_url", "jpg", "jpeg", "png", "webp"),
)
CAPTION_COLUMNS = ("caption", "text", "captions", "title", "raw", "sentences", "comment")

MISSING = ("NaN", "nan", "null", "None")  # in a cell of text, what pandas and others write where there is no value
JSON_SUFFIXES = (".json", ".jsonl")
TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
ITEM = rf"(?:{TEXT}|{'|'.join(MISSING)})"
ITEMS = rf"\s*(?:{ITEM}(?:[\s,]+{ITEM})*[\s,]*)?"
# Lists as Python and NumPy print them, and tuples. A text in parentheses is a tuple only with a comma.
LIST = re.compile(rf"\[{ITEMS}\]|\((?:\s*|\s*{ITEM}\s*,{ITEMS})\)", re.DOTALL)


def read_table(
    path: Path,
    *,
    image_columns: Sequence[str] = IMAGE_COLUMNS,
    caption_columns: Sequence[str] = (),
    splits: Sequence[str] = (),
) -> Iterator[Entry | SkippedEntry]:
    """Yield the rows of a table. Columns other than those of the image and its captions become fields.

    Args:
        caption_columns: names of columns, whose captions are all taken; none: the usual names.
        splits: those to take, of a table with the column `split`; none: all.

    Raises:
        SourceError: if the file is not what its suffix says, or lacks the columns or a split.
    """
    lacking, image_column, groups = None, None, tuple[tuple[str, ...], ...]()
    missing = MISSING if _is_text_table(path) else ()
    for number, row in _select(path, _rows(path, image_columns, caption_columns), splits):
        if isinstance(row, SkippedEntry):
            yield row
            continue
        source = f"{path.name}, row {number}"
        if image_column not in row:
            image_column = find_column(row, image_columns) or image_column
        groups = _caption_groups(tuple(row), tuple(caption_columns)) or groups
        if image_column is None or not groups:
            lacking = lacking or _missing_columns(path, row, image_columns, caption_columns)
            if path.suffix.lower() not in JSON_SUFFIXES:  # in JSON, each row has its own columns
                break
            yield bad_row(source, f"its columns are {_quote(row)}")
            continue
        image, captions = row.pop(image_column, None), ()
        for group in groups:
            cells = [row.pop(name, None) for name in group]
            captions = tuple(text for cell in cells if cell not in missing for text in cell_captions(cell))
            if captions:
                break
        yield _entry(path, source, image_column, image, captions, row)
    if lacking is not None and (image_column is None or not groups):
        raise lacking


def _select(
    path: Path, rows: Iterator[dict[str, Any] | SkippedEntry], splits: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any] | SkippedEntry]]:
    """Yield the rows of the splits, or all, with their numbers from 1."""
    found = set[str]()
    for number, row in enumerate(rows, 1):
        if splits and isinstance(row, dict):
            column = find_column(row, ("split",))
            if column is not None:
                found.add(str(row[column]))
            if column is None or str(row[column]) not in splits:
                continue
        yield number, row
    if absent := [split for split in splits if split not in found]:
        there = f"no row of the split {absent[0]}, but of {_quote(sorted(found)[:20])}" if found else "no column split"
        raise SourceError(f"{path} has {there}")


def _entry(
    path: Path, source: str, image_column: str, image: Any, captions: tuple[str, ...], fields: dict[str, Any]
) -> Entry | SkippedEntry:
    """Return the entry of a row, whose cell `image` is a name, a URL, Hugging Face's `{bytes, path}`, or not usable."""
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    if isinstance(image, Embedded):
        inside = Inside(str(path), image_column, image.row)
        return Entry(name=image.name, captions=captions, fields=fields, inside=inside)
    if isinstance(image, str) and image:
        return Entry(name=image.strip() if "://" in image else image, captions=captions, fields=fields)
    message = f"the column {image_column} is empty"
    if image is not None and image != "":
        message = (
            f"the column {image_column} holds {type(image).__name__}, not paths or URLs; "
            "store the images as files, or name another column with --image-column"
        )
    return SkippedEntry(source=source, kind="no_picture", message=message)


def _is_text_table(path: Path) -> bool:
    """Return whether the cells of a table are all text, as in CSV and TSV."""
    return path.suffix.lower() not in (".parquet", *JSON_SUFFIXES)


def cell_captions(value: Any) -> tuple[str, ...]:
    """Return the captions in a cell: a text, a list, or a list or tuple that was written as a text, `["a", "b"]`.

    A list may hold texts, objects with the text under `raw`, and missing values, which are left out.
    """
    found = _written_list(value.strip()) if isinstance(value, str) else value
    if isinstance(found, list):
        return texts_in([text.get("raw") if isinstance(text, dict) else text for text in found])
    return texts_in(value)


def _written_list(written: str) -> list[Any] | None:
    """Return the list that JSON, Python or NumPy wrote as a text; None if it is another text, such as `[a dog]`."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        found = None
    if found is None and LIST.fullmatch(written):
        items = [item for item in re.findall(ITEM, written[1:-1], re.DOTALL) if item not in MISSING]
        try:
            found = [ast.literal_eval(item) for item in items]
        except (ValueError, SyntaxError):  # of an escape that Python does not know
            return None
    usable = isinstance(found, list) and all(isinstance(text, str | dict | None) or text != text for text in found)
    return found if usable else None


def find_column(names: Any, wanted: Sequence[str]) -> str | None:
    """Return the first of the wanted columns that there is. Upper and lower case are the same."""
    there = {str(name).lower(): name for name in reversed(list(names))}
    return next((there[name.lower()] for name in wanted if name.lower() in there), None)


@lru_cache(maxsize=256)
def _caption_groups(names: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return groups of columns whose captions belong together, the preferred group first.

    The wanted columns are one group, if all are there. Otherwise each usual name is one, with its numbered columns,
    such as `caption_0` and `caption1`."""
    if wanted:
        there = tuple(name for each in wanted if (name := find_column(names, (each,))) is not None)
        return (there,) if len(there) == len(wanted) else ()
    groups = []
    for usual in CAPTION_COLUMNS:
        numbered = [(int(found[1] or -1), name) for name in names if (found := _match_numbered(usual, name))]
        groups.append(tuple(name for _, name in sorted(numbered)))
    return tuple(filter(None, groups))


def _match_numbered(usual: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{usual}(?:[ _.-]?(\d{{1,9}}))?", name, re.IGNORECASE)


def is_table(document: Any) -> bool:
    """Return whether JSON holds rows: a list of objects, or kohya's objects by the names of their images."""
    if isinstance(document, list):
        return any(isinstance(row, dict) for row in document)
    return isinstance(document, dict) and _is_kohya(document)


def _is_kohya(document: dict[str, Any]) -> bool:
    values = document.values()
    return bool(values) and all(isinstance(value, dict) and {"caption", "tags"} & set(value) for value in values)


def _missing_columns(path: Path, row: dict[str, Any], images: Sequence[str], captions: Sequence[str]) -> SourceError:
    wanted, remedy = images, "name the one with the images, --image-column"
    if find_column(row, images) is not None:
        wanted, remedy = captions or CAPTION_COLUMNS, "name those with captions, --caption-column NAME [NAME ...]"
    problem = f"{path} has no column {' or '.join(wanted)}, but {_quote(row)}"
    if _is_text_table(path) and any(map(names_image, row)):
        return SourceError(f"{problem}: write the names of the columns into a line above the first row")
    return SourceError(f"{problem}: {remedy}")


def _quote(names: Any) -> str:
    return ", ".join(f"{name!r:.60}" for name in names)


def _rows(path: Path, images: Sequence[str], captions: Sequence[str]) -> Iterator[dict[str, Any] | SkippedEntry]:
    match path.suffix.lower():
        case ".parquet":
            return parquet_rows(path, find_column(column_names(path), images))
        case ".json" if not is_lines(path):
            return _document_rows(read_json(path))
        case ".json" | ".jsonl":
            return _json_rows(path)
        case _:
            return csv_rows(path, (*images, *(captions or CAPTION_COLUMNS)))


def is_lines(path: Path) -> bool:
    """Return whether a JSON file has an object on its first line, and more lines: JSON lines under another suffix."""
    lines = (line for _, line in read_lines(path) if isinstance(line, SkippedEntry) or line.strip())
    first, second = next(lines, None), next(lines, None)
    try:
        return second is not None and isinstance(first, str) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _document_rows(document: Any) -> Iterator[dict[str, Any] | SkippedEntry]:
    if isinstance(document, dict) and _is_kohya(document):
        document = [{"image": name, "caption": row.get("tags"), **row} for name, row in document.items()]
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if isinstance(row, dict):
            yield row
        else:
            yield bad_row(f"row {number}", "not a JSON object")


def _json_rows(path: Path) -> Iterator[dict[str, Any] | SkippedEntry]:
    for number, line in read_lines(path):
        if isinstance(line, SkippedEntry):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else bad_row(f"{path.name}, line {number}", "not a JSON object")
